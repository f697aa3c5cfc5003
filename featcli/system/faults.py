"""Tell errors of the machine, which end a run, from those that say something about a file.

A disk, a network share or a limit of this process is at fault. No image fails because of it and no shard is damaged:
the run ends with exit code 7, and the same command resumes. This is the boundary for reads; `disk_errors` in
`dump/atomic_file.py` is the one for writes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals

from featcli.errors import MachineError, shown

# They are listed by name, because not every system has all of them.
_NAMES = (
    "EIO EREMOTEIO ENODEV ENXIO ENOMEDIUM ENODATA EBADMSG EUCLEAN "  # disks, and what takes their place
    "ESTALE ENOLINK ENOTCONN ETIMEDOUT ETIME EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET ENONET ECOMM "
    "ECONNRESET ECONNABORTED ECONNREFUSED ESHUTDOWN EPROTO EPROTONOSUPPORT EREMCHG EBADE EBADFD ECANCELED "  # networks
    "ENOKEY EKEYEXPIRED EKEYREVOKED EKEYREJECTED "  # tickets of network shares, keys of encrypted folders
    "ENOMEM EMFILE ENFILE ENOBUFS ENOSPC EDQUOT ENOLCK EUSERS EAGAIN EBUSY EINTR ENOSYS"  # limits
)
MACHINE = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))
# A disk has lost bytes if it gives one of these errors. They may be those of one file alone.
LOST = frozenset(getattr(errno, name) for name in ("EIO", "ENODATA", "EBADMSG", "EUCLEAN") if hasattr(errno, name))
# These errors say that a name leads to no file.
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})

RESUMES = "run the same command again: it resumes, and what is safe stays"
_TO_DO = {
    errno.EMFILE: "raise ulimit -n",
    errno.ENFILE: "this machine has too many open files",
    errno.ENOMEM: "free some memory",
    errno.EACCES: "see to its rights and those of the folders above it",
}


def is_of_machine(error: BaseException) -> bool:
    """Return whether an error is the machine's."""
    return isinstance(error, OSError) and error.errno in MACHINE


def machine_error(what: str, error: OSError) -> MachineError:
    """Return the error that says in one line what could not be read, such as "image 'a.jpg'", and what to do."""
    cause = os.strerror(error.errno) if error.errno else str(error)
    to_do = _TO_DO.get(error.errno or 0, "check the disk or the network share")
    return MachineError(f"{what}: {cause}", f"{to_do}; {RESUMES}")


@contextmanager
def machine_errors(what: str, name: object, strict: bool = False) -> Iterator[None]:
    """Turn errors of the machine inside the block into MachineError. All others pass.

    With `strict`, only errors pass that say that there is no such file: any other error that keeps a file of a dump
    from being read is no damage.
    """
    try:
        yield
    except OSError as error:
        refuse_of_machine(what, name, error, strict)
        raise


def refuse_of_machine(what: str, name: object, error: OSError, strict: bool = False) -> None:
    """Raise MachineError if an error is the machine's. See `machine_errors`."""
    if error.errno in MACHINE or (strict and error.errno is not None and error.errno not in ABSENT):
        raise machine_error(f"{what} {shown(name)}".lstrip(), error) from error


def fault_behind(error: BaseException) -> OSError | None:
    """Return the error of the machine that caused an error of a library, or None."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, OSError) and one.errno in MACHINE:
            return one
        left += [one.__cause__, one.__context__]
    return None


def how_it_ended(code: int) -> str:
    """Say how a process ended that had no reason to: by a signal, or with an exit code."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"killed by {Signals(-code).name}"
    except ValueError:  # real-time signals have no name
        return f"killed by signal {-code}"
