"""Turn a Python caller's pictures into input pixels: paths, Pillow's pictures, arrays, tensors, or lists of these."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from featcli.errors import UsageError, shown
from featcli.inputs.image_list import MISSING
from featcli.inputs.image_list import Image as Input
from featcli.pixels import bands
from featcli.pixels.bands import OF_COLOURS
from featcli.pixels.colour import upright_rgb
from featcli.pixels.decode import fitted_pixels
from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import pillow_set_up, untouched_file
from featcli.pixels.memory import TAKEN, array_of, picture_of
from featcli.spec.groups import PixelSpec
from featcli.spec.parsers import Size
from featcli.system.threads import DecodeThreads

if TYPE_CHECKING:
    from featcli.pixels.decoder import Pixels


def prepared(given: Any, rules: PixelSpec, preprocessing: Pixels, size: Size) -> torch.Tensor:
    """Return the pixels of one picture, (C, H, W), or of a list of them, (B, C, H, W), as a run makes them from files.

    `size` is the (H, W) of the input. A picture of Pillow that was opened but not unpacked yet is read from its file.
    Raises UsageError for something that is no picture or cannot be read, and for a list whose pictures differ in size.
    """
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        several = [prepared(one, rules, preprocessing, size) for one in given]
        if len({one.shape for one in several}) != 1 or several[0].ndim != 3:
            sizes = ", ".join(str(tuple(one.shape)) for one in several[:4]) or "none"
            raise UsageError(
                f"pictures of {sizes} pixels cannot form one batch", "prepare them one by one: each is a batch"
            )
        return torch.stack(several)
    values = array_of(given)
    if isinstance(values, np.ndarray) and values.ndim == 4:
        return prepared(list(values), rules, preprocessing, size)
    name, fit = "a picture", preprocessing.fit_for(rules.decode)
    try:
        if preprocessing.channels not in OF_COLOURS and isinstance(values, np.ndarray | Image.Image):
            greys, _ = bands.in_memory(values, rules, preprocessing.channels)
            return torch.tensor(fit(greys))
        if isinstance(values, np.ndarray):
            return torch.tensor(fit(upright_rgb(picture_of(values, rules), rules)))
        path = untouched_file(values) if isinstance(values, Image.Image) else values
        if isinstance(values, Image.Image) and not path:
            return torch.tensor(fit(upright_rgb(values, rules)))
        if not isinstance(path, str | os.PathLike):
            raise UsageError(f"{type(given).__name__} is not a picture", TAKEN)
        name = f"picture {shown(os.fspath(path))}"
        image = Input(os.fspath(path), os.fspath(path), MISSING)
        # Pillow runs in another thread, because Ctrl-C could not interrupt it in the main one.
        with pillow_set_up(rules.max_pixels), DecodeThreads(1, "picture") as pool:
            pixels, _ = pool.submit(fitted_pixels, image, rules, fit, preprocessing.channels, max(size)).result()
            if isinstance(values, Image.Image):
                values.load()  # as any use of the picture would: Pillow closes the file then
    except UnreadableError as error:
        hint = "convert it to 8 or 16 bits, or say which values are black and white: depth_range"
        hint = hint if error.reason == "unsupported_depth" else "see docs/pictures.md"
        raise UsageError(f"{name} cannot be prepared: {error.reason}: {error.detail}", hint) from error
    return torch.tensor(pixels)
