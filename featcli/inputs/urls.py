"""List images behind URLs (s3://, gs://, hf:// ...) with fsspec, and fetch them one by one into memory.

A server that fails, a network or a token that is gone is the machine's fault. An object is at fault if it is not there,
or if the server refuses it but gives others.
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
CHAINED = "::"  # fsspec reaches one file system through another by this
CACHES = ("simplecache", "filecache")  # these may lead a chain, because an image is read through them as without them
ARCHIVES = ("zip", "tar", "libarchive")
WEB = ("http", "https")  # fsspec tries these only once; s3fs, gcsfs and others try again by themselves
PAUSES = (0.5, 1.5)  # seconds before the second and the third try
ABSENT = (404, 410)
PASSING = (408, 425, 429)  # answers that may be different a little later, as all from 500 on

Answer = TypeVar("Answer")
pause = time.sleep  # tests replace it


class Remote:
    """A URL and its file system. Raises UsageError for a URL that no file system knows, or that cannot work."""

    def __init__(self, url: str) -> None:
        _refuse_chains(url)
        self._protocol = url.rpartition(CHAINED)[2].partition("://")[0]
        try:
            import fsspec

            self._system, self._path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            package = PACKAGES.get(self._protocol, "fsspec")
            raise UsageError(f"{shown(url)}: {one_line(error)}", f"pip install {package}") from error
        except (ValueError, TypeError) as error:  # TypeError if a part is missing, such as the host
            raise UsageError(f"{shown(url)}: {one_line(error)}", "use a protocol that fsspec knows") from error
        except Exception as error:
            raise out_of_reach(url, error) from error
        self.url = url

    def is_folder(self) -> bool:
        """Return whether there are files below it. Raises UsageError if there is nothing, and MachineError."""
        try:
            return bool(self._answer(lambda: self._system.info(self._path))["type"] == "directory")
        except FileNotFoundError as error:
            raise UsageError(
                f"input {shown(self.url)}: there is nothing at this URL",
                "give the URL of a folder, a tar file or an image",
            ) from error

    def files(self) -> Iterator[tuple[str, int]]:
        """Yield (path below it, size) of each file. Raises MachineError, also if a folder below cannot be listed."""
        found = self._present(lambda: _found(self._system, self._path))
        above = self._path.rstrip("/") + "/"
        for path, info in found.items():
            yield path.removeprefix(above), size_of(info)

    def size(self) -> int:
        """Return the size of the file in bytes. Raises MachineError."""
        return size_of(self._present(lambda: self._system.info(self._path)))

    def state(self) -> str:
        """Return a text that tells the file from another of its name: a tag, a time or whatever its file system has.

        Raises MachineError.
        """
        return str(self._present(lambda: self._system.ukey(self._path)))

    def is_gone(self) -> bool:
        """Return whether nothing has this name any more. Raises MachineError.

        A web server knows no folders, so its answer for one object is all that can be asked.
        """
        return self._protocol not in WEB and not self._present(lambda: self._system.exists(self._path))

    def read(self, some: Callable[[IO[bytes]], Answer]) -> Answer:
        """Return what `some` makes of the open file, which it reads forwards, with leaps.

        If a read fails, it starts once more.

        Raises MachineError, and the FeatcliErrors of `some`.
        """

        def read() -> Answer:
            with self._system.open(self._path, "rb") as file:
                return some(file)

        return self._present(read)

    def start(self, count: int) -> bytes:
        """Return the first bytes of the file; b"" if it is gone, or if its server only gives whole files."""
        try:
            return self.fetch(0, count)
        except (FileNotFoundError, PermissionError, MachineError):  # reading the image will say what is wrong
            return b""

    def fetch(self, first: int | None = None, count: int | None = None) -> bytes:
        """Return the bytes of the file, or some of them.

        Raises FileNotFoundError, PermissionError if this object is refused, perhaps with all others, and MachineError
        for anything else.
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
        """Return whether the server, not a cache in front of it, gives the first byte of the object at once."""
        try:
            direct = Remote(self.url.rpartition(CHAINED)[2])
            return bool(direct._system.cat_file(direct._path, 0, 1))
        except Exception:
            return False

    def _present(self, ask: Callable[[], Answer]) -> Answer:
        """Return the answer about a file that has to be there. Raises MachineError."""
        try:
            return self._answer(ask)
        except FileNotFoundError as error:
            raise out_of_reach(self.url, error) from error

    def _answer(self, ask: Callable[[], Answer]) -> Answer:
        """Ask a file system, and ask again if that may help.

        Raises FileNotFoundError, and MachineError for anything else.
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
        """Return the web server's own answer, because fsspec turns any answer into an absent file."""
        is_answer = self._protocol in WEB and isinstance(error, FileNotFoundError) and error.__cause__ is not None
        return (error.__cause__ if is_answer else None) or error


def _found(system: Any, path: str) -> dict[str, dict[str, Any]]:
    """Return what is known about the files below a folder, by path. Raises what the file system raises.

    fsspec's own walk leaves out folders that cannot be listed. This one raises for them.
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
                continue  # a link in a circle, or one that is gone meanwhile
            raise
        for info in inside:
            if info["type"] != "directory":
                found[info["name"]] = info
            elif info["name"].rstrip("/") != folder.rstrip("/"):
                folders.append(info["name"])
    return found


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of a server's answer; None if there was no answer."""
    found = [getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None)]
    return next((status for status in found if isinstance(status, int)), None)


def _is_refusal(error: BaseException) -> bool:
    """Return whether a server refused access to an object."""
    status = _status(error)
    return isinstance(error, PermissionError) or (status is not None and 400 <= status < 500 and status not in PASSING)


def _refuse_chains(url: str) -> None:
    """Raise UsageError for a chained URL that fsspec can open but that cannot lead the names of images.

    The path of an image is put at the end of the URL. In `zip://inside::s3://bucket/x.zip` the end is the archive's
    path, and a cache such as `simplecache::s3://bucket/photos` has no path of its own.
    """
    *through, last = url.split(CHAINED)
    archive = next((part for part in (*through, last) if part.partition("://")[0] in ARCHIVES), None)
    if archive is not None:
        raise UsageError(
            f"{shown(url)}: featcli does not read a URL inside of an archive",
            "name a plain .tar file by its own URL, or unpack the archive and name the folder",
        )
    if other := next((part for part in through if part not in CACHES), None):
        raise UsageError(
            f"{shown(url)}: this is a chain of file systems with {shown(other)} in it",
            f"name the last alone: {last}; {' or '.join(CACHES)} may stand before it",
        )


def size_of(info: dict[str, Any]) -> int:
    """Return the size that a file system gives, or MISSING."""
    return MISSING if info.get("size") is None else int(info["size"])


def out_of_reach(url: str, error: BaseException) -> MachineError:
    """Return the error for a URL behind which every image would fail: no network, no rights, no answer."""
    return MachineError(
        f"{shown(url)}: {type(error).__name__}: {one_line(error)}",
        "check the network and your credentials, and run the same command again: it resumes, and what is safe stays",
    )
