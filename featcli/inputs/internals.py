"""What of tarfile is used though nobody promises it: the one place to mend when a later Python changes it.

tests/test_internals.py says what breaks without each.
"""

from __future__ import annotations

import tarfile


def forget_members(tar: tarfile.TarFile) -> None:
    """Let go of the members that `next` gave so far: the file remembers all of them in a list, and tars hold millions.

    From Python 3.13 on `tarfile.open(stream=True)` remembers none.
    """
    tar.members.clear()  # type: ignore[attr-defined]


def end_of_member(tar: tarfile.TarFile) -> int:
    """Where the member that `next` gave last ends, with what fills up its last block: there the next header begins."""
    return tar.offset
