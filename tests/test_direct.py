"""Check that rows reach the file complete, in whichever way the file system allows."""

import errno
import os

import numpy as np
import pytest

from featcli.dump.shard import LEAST, PAGE, DirectFile
from featcli.run.transfers import Buffers

REAL = os.open, os.pwrite
O_DIRECT = getattr(os, "O_DIRECT", 0)


def rows(count):
    """Return so many bytes that start on a page."""
    array = Buffers().take("stage1", count).numpy()[:count]
    array[:] = np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8)
    return array


PIECES = [rows(LEAST), rows(100), rows(LEAST), rows(2 * LEAST), rows(LEAST + 1)]
OFFSETS = [PAGE, 100, LEAST + PAGE, 3 * LEAST, 6 * LEAST]


def written(path):
    """Write all pieces through one file, and return what it holds in their places."""
    file = DirectFile(os.open(path, os.O_CREAT | os.O_RDWR, 0o600), path)
    try:
        for piece, offset in zip(PIECES, OFFSETS, strict=True):
            file.write(piece, offset)
    finally:
        file.close()
    content = np.fromfile(path, np.uint8)
    return [content[offset : offset + len(piece)] for piece, offset in zip(PIECES, OFFSETS, strict=True)]


def all_there(path):
    return all(np.array_equal(one, other) for one, other in zip(written(path), PIECES, strict=True))


def test_rows_go_past_the_cache(tmp_path, monkeypatch):
    """Whole pages go past the page cache, everything else does not, and every byte is in its place."""
    direct, sizes = [], []

    def open_(path, flags, *more):
        descriptor = REAL[0](path, flags, *more)
        if flags & O_DIRECT:
            direct.append(descriptor)
        return descriptor

    def pwrite(descriptor, content, offset):
        sizes.append((descriptor in direct, len(content)))
        return REAL[1](descriptor, content, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert all_there(tmp_path / "file")
    if not direct:
        pytest.skip("this file system has no O_DIRECT")
    assert sizes == [(True, LEAST), (False, 100), (True, LEAST), (True, 2 * LEAST), (False, LEAST + 1)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT])
@pytest.mark.parametrize("refusal", ["open", "pwrite"])
def test_file_systems_that_have_no_such_way(tmp_path, monkeypatch, refusal, code):
    """If O_DIRECT is refused, at once or at the first write, the file has the same bytes."""
    direct = set()

    def open_(path, flags, *more):
        if flags & O_DIRECT and refusal == "open":
            raise OSError(code, "refused")
        descriptor = REAL[0](path, flags & ~O_DIRECT, *more)
        direct.add(descriptor if flags & O_DIRECT else -1)
        return descriptor

    def pwrite(descriptor, content, offset):
        if descriptor in direct:
            raise OSError(code, "refused")
        return REAL[1](descriptor, content, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert all_there(tmp_path / "file")


def test_a_system_that_takes_less_at_a_time(tmp_path, monkeypatch):
    """A write that the system cuts short is continued, also if it ends inside a page."""
    monkeypatch.setattr(os, "pwrite", lambda file, content, offset: REAL[1](file, content[: 3 * PAGE + 5], offset))
    monkeypatch.setattr(os, "open", lambda path, flags, *more: REAL[0](path, flags & ~O_DIRECT, *more))
    assert all_there(tmp_path / "file")


def test_a_full_disk_is_not_taken_for_another_way(tmp_path, monkeypatch):
    """Errors that do not mean a missing direct way are raised."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file")
