"""Find where in a network its maps come from: the module whose output a map is, except for where its values lie.

It is found while the network runs. Nothing is computed between a module and a map: tokens are put into a grid, windows
are joined, class tokens are left out. A final norm for maps does not count either, because `--norm` may leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

INPUT = "pixel_values"  # the place of a map that is the input itself, by transformers' name
# Torch's functions and methods that move values, or copy them.
MOVES = frozenset(
    "__getitem__ chunk clone contiguous detach expand flatten float movedim narrow pad permute reshape roll select"
    " split squeeze swapaxes t to transpose type unbind unflatten unsqueeze view view_as".split()
)


class Places:
    """The modules of a network that runs once inside `watched`, and the output of each."""

    def __init__(self, pixels: torch.Tensor, is_norm: Callable[[str], bool]) -> None:
        """Prepare to watch. `is_norm` recognises the names of norms that maps may pass."""
        self._is_norm = is_norm
        self._pixels = pixels
        self._before: dict[int, torch.Tensor] = {}  # id of a tensor -> the tensor whose values it holds
        self._makers: dict[int, list[str]] = {}  # id of a tensor -> the modules that gave it
        self._runs: dict[str, int] = {}
        self._kept: list[torch.Tensor] = []  # keeps tensors, so that no id is used again

    @contextmanager
    def watched(self, module: nn.Module) -> Iterator[Places]:
        """Watch everything that a module runs inside the block."""
        hooks = [
            part.register_forward_hook(lambda _, given, out, name=name: self._ran(name, given, out))
            for name, part in module.named_modules()
            if name and not isinstance(part, nn.Identity)
        ]
        try:
            with _Watching(self):
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def of(self, found: torch.Tensor) -> str | None:
        """Return the outermost module that gives a map, INPUT for the input, None if the map was computed after all.

        A module that runs several times is the place of no map.
        """
        names: list[str] = []
        tensor: torch.Tensor | None = found
        while tensor is not None:
            if tensor is self._pixels:
                return INPUT
            names += self._makers.get(id(tensor), [])
            tensor = self._before.get(id(tensor))
        once = [name for name in names if self._runs[name] == 1]
        return min(once, key=lambda name: name.count("."), default=None)

    def moved(self, given: torch.Tensor, made: torch.Tensor) -> None:
        """Note that a tensor holds the values of another."""
        if made is not given:
            self._keep(given, made)
            self._before[id(made)] = given

    def changed(self, tensor: torch.Tensor) -> None:
        """Note that other values were written into a tensor, so that it is no longer the output of any module."""
        self._makers.pop(id(tensor), None)
        self._before.pop(id(tensor), None)

    def _ran(self, name: str, given: Sequence[Any], out: Any) -> None:
        self._runs[name] = self._runs.get(name, 0) + 1
        first = out[0] if isinstance(out, list | tuple) and out else out
        if not isinstance(first, torch.Tensor):
            return
        self._keep(first)
        if self._is_norm(name) and given and isinstance(given[0], torch.Tensor):
            self.moved(given[0], first)
        else:
            self._makers.setdefault(id(first), []).append(name)

    def _keep(self, *tensors: torch.Tensor) -> None:
        self._kept += tensors


class _Watching(TorchFunctionMode):
    """Reports what torch's functions do with tensors."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given, name = args[0] if args else None, getattr(func, "__name__", "")
        if not isinstance(given, torch.Tensor):
            return made
        if name in MOVES:
            for one in made if isinstance(made, list | tuple) else (made,):
                if isinstance(one, torch.Tensor):
                    self._places.moved(given, one)
        elif made is given or name == "__setitem__":
            self._places.changed(given)
        return made
