"""What a shell offers after `-c`: names of models from the list of a sweep, since timm takes seconds to import."""

from __future__ import annotations


def model_names(incomplete: str) -> list[str]:
    """The names that begin so; none where the list cannot be read. Local paths are the shell's own to complete."""
    from featcli.views.models import read_facts

    return [name for name in read_facts()["timm"]["models"] if name.startswith(incomplete)]
