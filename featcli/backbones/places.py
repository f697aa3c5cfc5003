"""Where in a network its maps come from: the module whose output each of them is, but for where its values lie.

It is seen while the network runs. Between a module and a map nothing is computed: tokens are put into a grid, windows
joined, class tokens left out. A final norm for maps counts as nothing, too, since `--norm` may leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

INPUT = "pixel_values"  # the place of a map that is the input itself, as transformers calls that
# What moves values, or copies them, by the names of torch's functions and methods.
MOVES = frozenset(
    "__getitem__ chunk clone contiguous detach expand flatten float movedim narrow pad permute reshape roll select"
    " split squeeze swapaxes t to transpose type unbind unflatten unsqueeze view view_as".split()
)


class Places:
    """The modules of a network that is run once inside `watched`, and what each of them gave."""

    def __init__(self, pixels: torch.Tensor, is_norm: Callable[[str], bool]) -> None:
        """`is_norm` tells the names of the norms that maps may go through."""
        self._is_norm = is_norm
        self._pixels = pixels
        self._before: dict[int, torch.Tensor] = {}  # of a tensor, by its id: the one that it holds the values of
        self._makers: dict[int, list[str]] = {}  # of a tensor: the modules that gave it
        self._runs: dict[str, int] = {}
        self._kept: list[torch.Tensor] = []  # so that no id is used again

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
        """Name the outermost module that gives a map, INPUT for the input, None where the map was computed after all.

        Of modules that run several times none is the place of one map.
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
        """Note that other values were written into a tensor: it is no longer what any module gave."""
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
    """Tells what torch's functions do with tensors."""

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
