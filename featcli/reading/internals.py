"""What of torch and CPython is used though nobody promises it: the one place to mend when a later release changes it.

tests/test_internals.py says what breaks without each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch


def shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in memory that another process is given without a copy; what is in it is nobody's.

    It is made as torch's own collate makes it: `share_memory_` would copy what is not there yet.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]


def is_held_by_none_but(items: Sequence[object], place: int) -> bool:
    """Whether a sequence alone knows what is at that place: nobody holds it, nor a tensor or an array over it.

    CPython counts who does. Two know it at this moment: the sequence and this question.
    """
    return sys.getrefcount(items[place]) == 2
