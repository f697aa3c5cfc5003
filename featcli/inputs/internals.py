"""Hold what featcli uses of tarfile although nobody promises it: the one place to mend when a later Python changes it.

tests/test_internals.py says what breaks without each.
"""

from __future__ import annotations

import tarfile


def forget_members(tar: tarfile.TarFile) -> None:
    """Drop the members that `next` has returned: a TarFile keeps all of them in a list, and tars hold millions.

    From Python 3.13 on `tarfile.open(stream=True)` keeps none.
    """
    tar.members.clear()  # type: ignore[attr-defined]


def end_of_member(tar: tarfile.TarFile) -> int:
    """Return the offset of the next header, which follows the last member and the rest of its last block."""
    return tar.offset
