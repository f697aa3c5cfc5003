"""Write a dump as one file or a folder of arrays.

It never is in memory as a whole, and never half under its final name.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial as partial_call
from pathlib import Path

from featcli.dump.atomic_file import PARTIAL, PARTIAL_NAME, create_partial, disk_errors, remove_stale, sync_folder
from featcli.dump.formats.layout import DoesNotFitError
from featcli.dump.target import refuse_inside, refuse_taken, write_files
from featcli.errors import ConflictError, MachineError, UsageError, shown
from featcli.events import Report, silent
from featcli.export.content import Content, content_of
from featcli.export.formats import SUFFIXES, export_format, format_of
from featcli.reading.named import rows_named
from featcli.reading.reader import DumpReader
from featcli.spec.commands import ExportCommand
from featcli.spec.parsers import parse_features
from featcli.system.files import is_folder, is_there, names_in

STDOUT = "-"
FOLDER = ".folder"  # end of the name of a folder that is not complete yet
IMAGES = "images.jsonl"  # file beside arrays that hold no keys: it says which image each row is


def export(dump: DumpReader, asked: ExportCommand, report: Report = silent) -> Content:
    """Write chosen stages and rows of a dump to a file, to a folder of .npy files, or as JSON lines to stdout (`-`).

    The suffix tells the format if `asked.to` does not. Returns what was written. Raises UsageError, ConflictError if
    the output exists already, IncompleteError if no shard is finished, DamagedError and MachineError.
    """
    dump.refuse_without_shards()
    output, name = asked.output, _format(asked.output, asked.to)
    known = export_format(name).DTYPES
    if asked.dtype is not None and asked.dtype not in known:
        raise UsageError(f"--dtype {asked.dtype}: {name} has no such type", f"use {', '.join(known)}")
    stages = dump.chosen_outputs(parse_features(asked.stage))
    rows = rows_named(dump, asked.keys, asked.where)
    content = content_of(dump, stages, asked.pool, asked.dtype, asked.keep_failed, rows)
    outputs = tuple(s if s.dtype in known else replace(s, dtype="float32") for s in content.outputs)
    content = replace(content, outputs=outputs, report=report)
    report("start", images=len(content.rows), done=0)
    if output == STDOUT:
        _stream(content)
    elif name == "npy" and (not Path(output).suffix or is_folder(output)):
        if asked.overwrite:
            raise UsageError(
                "--overwrite is only for a file",
                f"leave --overwrite out: -o {shown(output)} is a folder, and none is overwritten",
            )
        _write_folder(content, Path(os.path.abspath(output)))
    else:
        _write_file(content, Path(output), name, asked.overwrite)
    return content


def _format(output: str, to: str | None) -> str:
    """Return the format. Raises UsageError if nothing tells it, or if output and format do not fit."""
    if output == STDOUT:
        if to not in (None, "jsonl"):
            raise UsageError(f"-o - --to {to}: only JSON lines can be streamed", "use --to jsonl, or name a file")
        return "jsonl"
    if to and format_of(output) not in (None, to):
        raise UsageError(f"-o {shown(output)} --to {to}: its suffix says {format_of(output)}", "give one of the two")
    name = to or format_of(output) or ("" if Path(output).suffix and not is_folder(output) else "npy")
    if not name:
        known = " ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise UsageError(
            f"-o {shown(output)}: no format has that suffix", f"use one of {known}, or none for a folder, or --to"
        )
    return name


def _stream(content: Content) -> None:
    from featcli.export.jsonl import lines

    if sys.stdout is None:
        raise MachineError("-o -: stdout is closed", "name a file")
    sys.stdout.flush()
    for line in lines(content):
        sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _write_file(content: Content, path: Path, name: str, overwrite: bool) -> None:
    """Write a file, which gets its name once it is complete and on the disk. An array also gets its list of images."""
    refuse_taken(path, overwrite)
    if name == "npy" and len(content.outputs) > 1:
        raise UsageError(
            f"-o {shown(path)}: a .npy file holds one stage, not {len(content.outputs)}",
            "choose it with --stage, or name a folder: it gets a file for each",
        )
    files = {path: partial_call(export_format(name).write, content)}
    if name == "npy":
        refuse_taken(images_beside(path), overwrite)
        files = {images_beside(path): partial_call(_write_images, content), **files}
    try:
        write_files(files, overwrite)
    except DoesNotFitError as error:
        raise UsageError(f"-o {shown(path)}: {error}", "name a .h5, .parquet or .jsonl file, or a folder") from None


def images_beside(path: Path) -> Path:
    """Return the path of the list of images that belongs to a .npy file."""
    return path.with_suffix(f".{IMAGES}")


def _write_folder(content: Content, path: Path) -> None:
    """Write a folder with a .npy file for each stage. It gets its name once everything is in it and on the disk."""
    refuse_inside(path)
    if is_there(path) and not (is_folder(path) and not names_in(path)):
        raise ConflictError(f"-o {shown(path)}: this folder is not empty", "name another folder: none is overwritten")
    with disk_errors(path, "-o"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_folders(path)
        descriptor, lock = create_partial(path)
        partial = lock.with_name(lock.name + FOLDER)
        try:
            partial.mkdir()
            write = {partial / IMAGES: partial_call(_write_images, content)}
            for stage in content.outputs:
                of_stage = replace(content, outputs=(stage,))
                write[partial / f"{stage.name}.npy"] = partial_call(export_format("npy").write, of_stage)
            write_files(write)
            os.replace(partial, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def _remove_stale_folders(path: Path) -> None:
    """Remove what kills have left of earlier exports to this folder: unfinished folders whose lock nobody holds."""
    remove_stale(path.parent, path.name)
    for left in path.parent.glob(f".*{PARTIAL}{FOLDER}"):
        lock = left.name.removesuffix(FOLDER)
        named = PARTIAL_NAME.fullmatch(lock)
        if named is not None and named[1] == path.name and not is_there(left.with_name(lock)):
            shutil.rmtree(left, ignore_errors=True)


def _write_images(content: Content, path: Path) -> None:
    with path.open("wb") as file:
        for key, is_valid, (row, cells) in zip(content.keys, content.valid.tolist(), content.cells(), strict=True):
            line = {"key": key, "row": int(row), **({"valid": is_valid} if content.keeps_failed else {}), **cells}
            file.write(json.dumps(line).encode("ascii") + b"\n")
