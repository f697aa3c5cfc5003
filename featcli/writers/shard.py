"""One shard file from its layout to its name: rows are written where they belong and hashed on the way."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from featcli.writers import FORMATS
from featcli.writers.layout import VALID, Array
from featcli.writers.publish import create_partial, publish
from featcli.writers.rows import write_all

REST = "rest"  # the hash of everything in the file that is not a stage: header, keys, valid


@dataclass(frozen=True)
class Written:
    """What became of a shard file."""

    file: str
    bytes: int
    hashes: Mapping[str, str]  # stage -> xxh3-128 of its rows in order; REST -> of all other bytes in order


class ShardWriter:
    """A shard being written under a partial name. Nothing exists under its own name before `commit`."""

    def __init__(
        self,
        final: Path,
        format_name: str,
        stages: Mapping[str, tuple[str, tuple[int, ...]]],  # name -> (dtype, shape of one image)
        keys: Sequence[str],
        attributes: Mapping[str, str],
    ) -> None:
        self.final = final
        arrays = {name: (dtype, (len(keys), *shape)) for name, (dtype, shape) in stages.items()}
        arrays[VALID] = ("uint8", (len(keys),))
        self._descriptor, self._partial = create_partial(final)
        try:
            self.layout = FORMATS[format_name].lay_out(str(self._partial), arrays, keys, attributes)
        except BaseException:
            self.abort()
            raise
        self._digests = {name: xxhash.xxh3_128() for name in stages}

    def write(self, row: int, maps: Mapping[str, np.ndarray]) -> None:
        """Write a run of rows that begins at `row` of this shard. Runs must come in row order."""
        for name, rows in maps.items():
            array = self.layout.arrays[name]
            content = rows.data.cast("B")
            assert len(content) == array.row_bytes * len(rows)
            assert row + len(rows) <= array.shape[0]
            self._digests[name].update(content)
            write_all(self._descriptor, content, array.offset + row * array.row_bytes)

    def commit(self, valid: np.ndarray, before_naming: Callable[[], None] | None = None) -> Written:
        """Mark the valid rows (uint8), and give the file its name. Afterwards it is on the disk.

        `before_naming` is called when all is on the disk but the name.
        """
        layout = self.layout
        write_all(self._descriptor, valid.astype(np.uint8).data, layout.arrays[VALID].offset)
        write_all(self._descriptor, memoryview(layout.header), 0)  # last: it makes the file a file
        os.fsync(self._descriptor)
        hashes = {name: digest.hexdigest() for name, digest in self._digests.items()}
        hashes[REST] = hash_rest(self._descriptor, self.layout.size, [layout.arrays[name] for name in self._digests])
        if before_naming is not None:
            before_naming()
        # A file without a record that differs from ours is nobody's: its record would have been written next.
        is_foreign = self.final.exists() and not filecmp.cmp(self._partial, self.final, shallow=False)
        publish(self._partial, self.final, replace=is_foreign)
        os.close(self._descriptor)
        return Written(self.final.name, layout.size, hashes)

    def abort(self) -> None:
        """Remove the partial file."""
        self._partial.unlink(missing_ok=True)
        os.close(self._descriptor)


def hash_rest(descriptor: int, size: int, arrays: Sequence[Array]) -> str:
    """xxh3-128 over the bytes of a file that lie outside the given arrays, in file order."""
    digest, position = xxhash.xxh3_128(), 0
    spans = sorted((array.offset, array.end) for array in arrays)
    for begin, end in [*spans, (size, size)]:
        digest.update(os.pread(descriptor, begin - position, position))
        position = end
    return digest.hexdigest()
