"""Find names of models by parts of them, as people remember them: `dinov2`, `vit_b_16`, `ViT-L/14`."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Papers and torchvision call the sizes of a model by these letters. Each is a part of a name by itself.
SIZES = {"ti": "tiny", "t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}
SEPARATORS = re.compile(r"[_\-/. ]+")
GLUED = re.compile(r"(vit|deit)(ti|[tsblhg])(\d+)")  # names of torch.hub, such as vitb14


def containing(typed: str, names: Iterable[str]) -> list[str]:
    """Return the names that contain all parts of a text; none for an empty text.

    If some names have the parts in the order of the text, only these are returned. Names with the same first part come
    first, then the shortest. Parts end at `_`, `-`, `/`, `.` and blanks. A part that is a letter for a size stands for
    its word or for itself, as a part of the name: `vit_b_16` finds `vit_base_patch16_224`, `efficientnet-v2-s` finds
    `efficientnetv2_s`, and `dinov2_vitb14` finds `vit_base_patch14_dinov2`.
    """
    parts = [part for part in SEPARATORS.split(GLUED.sub(r"\1_\2_\3_", typed.lower())) if part]
    if not parts:
        return []
    patterns = [rf"(?<=_)(?:{SIZES[part]}|{part})(?=_|$)" if part in SIZES else re.escape(part) for part in parts]
    in_order, known = re.compile(".*".join(patterns)), list(names)
    found = [name for name in known if in_order.search(name.lower())]
    found = found or [name for name in known if all(re.search(pattern, name.lower()) for pattern in patterns)]
    return sorted(found, key=lambda name: (SEPARATORS.split(name.lower())[0] != parts[0], len(name), name))
