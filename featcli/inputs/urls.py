"""Images behind URLs (s3://, gs://, hf:// ...), by way of fsspec: listed, and fetched one by one into memory.

A server that fails, a network or a token that is gone is the machine's fault. It is an object's own that it is not
there, or that it is kept from us while the same server gives others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from featcli.errors import FeatcliError, MachineError, UsageError, one_line, shown
from featcli.inputs.image_list import MISSING
from featcli.system import faults

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp"}
PACKAGES |= {"https": "aiohttp", "hf": "huggingface_hub"}
CHAINED = "::"  # what fsspec takes for several file systems, one through the other
CACHES = ("simplecache", "filecache")  # the ones of a chain through which an image is read as without them
ARCHIVES = ("zip", "tar", "libarchive")
WEB = ("http", "https")  # fsspec tries these once alone; s3fs, gcsfs and the like try again by themselves
PAUSES = (0.5, 1.5)  # seconds before the second and the third try
ABSENT = (404, 410)
PASSING = (408, 425, 429)  # what a server may answer otherwise a little later, as all from 500 on

Answer = TypeVar("Answer")
pause = time.sleep  # tests have another one


class Remote:
    """A URL and the file system that it is on. Raises UsageError for one that nobody knows, or that cannot work."""

    def __init__(self, url: str) -> None:
        _refuse_chains(url)
        self._protocol = url.rpartition(CHAINED)[2].partition("://")[0]
        try:
            import fsspec

            self._system, self._path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            package = PACKAGES.get(self._protocol, "fsspec")
            raise UsageError(f"{shown(url)}: {one_line(error)}", f"pip install {package}") from error
        except (ValueError, TypeError) as error:  # a TypeError where a part is missing, such as the host
            raise UsageError(f"{shown(url)}: {one_line(error)}", "see the protocols that fsspec knows") from error
        except Exception as error:
            raise out_of_reach(url, error) from error
        self.url = url

    def is_folder(self) -> bool:
        """Whether there are files below it. Raises UsageError where there is nothing, and MachineError."""
        try:
            return bool(self._answer(lambda: self._system.info(self._path))["type"] == "directory")
        except FileNotFoundError as error:
            raise UsageError(
                f"input {shown(self.url)}: nothing there", "an input is a folder, a tar file or an image"
            ) from error

    def files(self) -> Iterator[tuple[str, int]]:
        """(path below it, size) of every file. Raises MachineError, also where a folder below cannot be listed."""
        found = self._present(lambda: _found(self._system, self._path))
        above = self._path.rstrip("/") + "/"
        for path, info in found.items():
            yield path.removeprefix(above), size_of(info)

    def size(self) -> int:
        """Of the file that it is. Raises MachineError."""
        return size_of(self._present(lambda: self._system.info(self._path)))

    def state(self) -> str:
        """What tells the file from another of its name: a tag, a time or whatever its file system has.

        Raises MachineError.
        """
        return str(self._present(lambda: self._system.ukey(self._path)))

    def is_gone(self) -> bool:
        """Whether there is no longer anything of that name. Raises MachineError.

        A web server knows no folders: what it says of one object is all that it says.
        """
        return self._protocol not in WEB and not self._present(lambda: self._system.exists(self._path))

    def read(self, some: Callable[[IO[bytes]], Answer]) -> Answer:
        """What is made of the open file, which is read in order with leaps; once more where a read failed.

        Raises MachineError, and the FeatcliError of what reads it.
        """

        def read() -> Answer:
            with self._system.open(self._path, "rb") as file:
                return some(file)

        return self._present(read)

    def start(self, count: int) -> bytes:
        """The first bytes of the file that it is; none where it is gone, or its server gives files whole alone."""
        try:
            return self.fetch(0, count)
        except (FileNotFoundError, PermissionError, MachineError):  # what it is will be seen when it is read
            return b""

    def fetch(self, first: int | None = None, count: int | None = None) -> bytes:
        """The file, or some bytes of it.

        Raises FileNotFoundError; PermissionError where it is kept from us, be it alone or with all others; and
        MachineError for all else.
        """
        stop = None if first is None or count is None else first + count
        try:
            content: bytes = self._answer(lambda: self._system.cat_file(self._path, first, stop))
            return content
        except MachineError as error:
            if error.__cause__ is not None and _is_refusal(error.__cause__):
                raise PermissionError(one_line(error.__cause__)) from error
            raise

    def is_given(self) -> bool:
        """Whether its server, not a cache before it, gives the object at once, or the beginning of it."""
        try:
            direct = Remote(self.url.rpartition(CHAINED)[2])
            return bool(direct._system.cat_file(direct._path, 0, 1))
        except Exception:
            return False

    def _present(self, ask: Callable[[], Answer]) -> Answer:
        """The answer about what has to be there. Raises MachineError."""
        try:
            return self._answer(ask)
        except FileNotFoundError as error:
            raise out_of_reach(self.url, error) from error

    def _answer(self, ask: Callable[[], Answer]) -> Answer:
        """Ask a file system, more than once where that may help.

        Raises FileNotFoundError, and MachineError for all else.
        """
        for seconds in (*(PAUSES if self._protocol in WEB else ()), None):
            try:
                return ask()
            except FeatcliError:
                raise
            except Exception as error:
                behind = self._behind(error)
                status = _status(behind)
                if status in ABSENT or isinstance(behind, FileNotFoundError):
                    raise FileNotFoundError(self.url) from error
                if seconds is None or (status is not None and status < 500 and status not in PASSING):
                    raise out_of_reach(self.url, behind) from behind
            pause(seconds)
        raise AssertionError("the last try returns or raises")

    def _behind(self, error: Exception) -> BaseException:
        """What a web server answered, where fsspec makes an absent file of any answer."""
        is_answer = self._protocol in WEB and isinstance(error, FileNotFoundError) and error.__cause__ is not None
        return (error.__cause__ if is_answer else None) or error


def _found(system: Any, path: str) -> dict[str, dict[str, Any]]:
    """What is known of the files below a folder, by their paths. Raises what the file system raises.

    Where fsspec itself looks into folder after folder, it leaves out those that cannot be listed; here they are.
    """
    from fsspec import AbstractFileSystem

    if type(getattr(system, "fs", None) or system).find is not AbstractFileSystem.find:
        found: dict[str, dict[str, Any]] = system.find(path, detail=True)
        return found
    found, folders = {}, [path]
    while folders:
        folder = folders.pop()
        try:
            inside = system.ls(folder, detail=True)
        except OSError as error:
            if folder != path and error.errno in faults.ABSENT:
                continue  # a link in a circle, or gone since
            raise
        for info in inside:
            if info["type"] != "directory":
                found[info["name"]] = info
            elif info["name"].rstrip("/") != folder.rstrip("/"):
                folders.append(info["name"])
    return found


def _status(error: BaseException) -> int | None:
    """What a server answered, by the number that HTTP has for it; None where there was no answer."""
    found = [getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None)]
    return next((status for status in found if isinstance(status, int)), None)


def _is_refusal(error: BaseException) -> bool:
    """Whether a server answered that it keeps an object to itself."""
    status = _status(error)
    return isinstance(error, PermissionError) or (status is not None and 400 <= status < 500 and status not in PASSING)


def _refuse_chains(url: str) -> None:
    """Raise UsageError for a URL that fsspec can open and that cannot lead the names of images.

    An image is found by a path that is put at the end. In `zip://inside::s3://bucket/x.zip` that is the end of the
    archive's path; a cache, as `simplecache::s3://bucket/photos`, has no path of its own.
    """
    *through, last = url.split(CHAINED)
    archive = next((part for part in (*through, last) if part.partition("://")[0] in ARCHIVES), None)
    if archive is not None:
        raise UsageError(
            f"{shown(url)}: inside of archives nothing is read by URL",
            "name a plain .tar file by its own URL, or unpack the archive and name the folder",
        )
    if other := next((part for part in through if part not in CACHES), None):
        raise UsageError(
            f"{shown(url)}: a chain of file systems with {shown(other)} in it",
            f"name the last alone: {last}; {' or '.join(CACHES)} may stand before it",
        )


def size_of(info: dict[str, Any]) -> int:
    """As a file system says it, where it does."""
    return MISSING if info.get("size") is None else int(info["size"])


def out_of_reach(url: str, error: BaseException) -> MachineError:
    """What no other image would find better: no network, no rights, no answer."""
    return MachineError(
        f"{shown(url)}: {type(error).__name__}: {one_line(error)}",
        "see network and credentials; what is safe stays, and the same command resumes",
    )
