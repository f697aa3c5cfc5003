"""Names of models by parts of them, as people remember them: `dinov2`, `vit_b_16`, `ViT-L/14`."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Letters by which papers and torchvision call the sizes of a model. Each is a part of a name by itself.
SIZES = {"ti": "tiny", "t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}
SEPARATORS = re.compile(r"[_\-/. ]+")


def containing(typed: str, names: Iterable[str]) -> list[str]:
    """List the names that contain all parts of a text in their order; none for an empty text.

    Those come first whose first part is the same, then the shortest. Parts end at `_`, `-`, `/`, `.` and blanks. A
    part that is a letter for a size stands for its word or for itself, as a part of the name: `vit_b_16` finds
    `vit_base_patch16_224`, and `efficientnet-v2-s` `efficientnetv2_s`.
    """
    parts = [part for part in SEPARATORS.split(typed.lower()) if part]
    pattern = re.compile(
        ".*".join(rf"(?<=_)(?:{SIZES[part]}|{part})(?=_|$)" if part in SIZES else re.escape(part) for part in parts)
    )
    found = [name for name in names if parts and pattern.search(name.lower())]
    return sorted(found, key=lambda name: (SEPARATORS.split(name.lower())[0] != parts[0], len(name), name))
