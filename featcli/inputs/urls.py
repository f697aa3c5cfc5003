"""Images behind URLs (s3://, gs://, hf:// ...), by way of fsspec: listed, and fetched one by one into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from featcli.errors import MachineError, UsageError, one_line, shown
from featcli.inputs.image_list import MISSING

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp"}
PACKAGES |= {"https": "aiohttp", "hf": "huggingface_hub"}
CHAINED = "::"  # what fsspec takes for several file systems, one through the other
CACHES = ("simplecache", "filecache")  # the ones of a chain through which an image is read as without them
ARCHIVES = ("zip", "tar", "libarchive")


class Remote:
    """A URL and the file system that it is on. Raises UsageError for one that nobody knows, or that cannot work."""

    def __init__(self, url: str) -> None:
        _refuse_chains(url)
        protocol = url.rpartition(CHAINED)[2].partition("://")[0]
        try:
            import fsspec

            self._system, self._path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            package = PACKAGES.get(protocol, "fsspec")
            raise UsageError(f"{shown(url)}: {one_line(error)}", f"pip install {package}") from error
        except (ValueError, TypeError) as error:  # a TypeError where a part is missing, such as the host
            raise UsageError(f"{shown(url)}: {one_line(error)}", "see the protocols that fsspec knows") from error
        except Exception as error:
            raise out_of_reach(url, error) from error
        self.url = url

    def is_folder(self) -> bool:
        """Whether there are files below it. Raises UsageError where there is nothing."""
        try:
            return bool(self._system.info(self._path)["type"] == "directory")
        except FileNotFoundError as error:
            raise UsageError(
                f"input {shown(self.url)}: nothing there", "an input is a folder, a tar file or an image"
            ) from error
        except Exception as error:
            raise out_of_reach(self.url, error) from error

    def files(self) -> Iterator[tuple[str, int]]:
        """(path below it, size) of every file."""
        try:
            found = self._system.find(self._path, detail=True)
        except Exception as error:
            raise out_of_reach(self.url, error) from error
        above = self._path.rstrip("/") + "/"
        for path, info in found.items():
            yield path.removeprefix(above), size_of(info)

    def size(self) -> int:
        """Of the file that it is."""
        try:
            return size_of(self._system.info(self._path))
        except Exception as error:
            raise out_of_reach(self.url, error) from error

    def state(self) -> str:
        """What tells the file from another of its name: a tag, a time or whatever its file system has."""
        try:
            return str(self._system.ukey(self._path))
        except Exception as error:
            raise out_of_reach(self.url, error) from error

    def exists(self) -> bool:
        """Whether there is anything of that name."""
        try:
            return bool(self._system.exists(self._path))
        except Exception as error:
            raise out_of_reach(self.url, error) from error

    def open(self) -> IO[bytes]:
        """The file, to be read in order with leaps."""
        try:
            file: IO[bytes] = self._system.open(self._path, "rb")
            return file
        except Exception as error:
            raise out_of_reach(self.url, error) from error

    def start(self, count: int) -> bytes:
        """The first bytes of the file that it is; none where it is gone, or its server gives files whole alone."""
        try:
            return self.fetch(0, count)
        except (FileNotFoundError, MachineError):  # what it is will be seen when it is read
            return b""

    def fetch(self, first: int | None = None, count: int | None = None) -> bytes:
        """The file, or some bytes of it. Raises FileNotFoundError, and MachineError for all else.

        What may not be read is no fault of an image's either: most often a token has expired.
        """
        stop = None if first is None or count is None else first + count
        try:
            content: bytes = self._system.cat_file(self._path, first, stop)
            return content
        except FileNotFoundError:
            raise
        except Exception as error:
            raise out_of_reach(self.url, error) from error


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


def out_of_reach(url: str, error: Exception) -> MachineError:
    """What no other image would find better: no network, no rights, no answer."""
    return MachineError(
        f"{shown(url)}: {type(error).__name__}: {one_line(error)}",
        "see network and credentials; what is committed stays, and the same command goes on",
    )
