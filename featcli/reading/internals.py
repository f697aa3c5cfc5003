"""Hold what featcli uses of torch and CPython although nobody promises it: the place to mend when a release changes it.

tests/test_internals.py says what breaks without each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch


def shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor in shared memory, which another process gets without a copy.

    It is made as torch's own collate makes it: `share_memory_` would copy what is not there yet.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]


def is_held_by_none_but(items: Sequence[object], place: int) -> bool:
    """Return whether only the sequence knows the object at a place: nobody holds it, nor a tensor or array over it.

    CPython counts the references. Two exist at this moment: that of the sequence and that of this call.
    """
    return sys.getrefcount(items[place]) == 2
