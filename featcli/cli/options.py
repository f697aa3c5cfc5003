"""What commands have in common: options, each with its help, and exit codes. Defaults and checks are config.py's."""

from __future__ import annotations

from typing import Annotated

import typer

from featcli.pixels.resize import FITS
from featcli.spec.config import DTYPES

EPILOG = """\b
Exit codes:
  0        done
  1        unexpected: a bug, or workers that died too often
  2        usage: a bad option, no images, an unknown stage or checkpoint name
  3        done, but some images failed and are recorded
  4        the dump is damaged, or --recompute found other values
  5        a dump of another plan, or in use; or a file that is there already
  6        the checkpoint is refused
  7        disk, device or memory
  8        the dump is incomplete, or shards of it are gone
  130/143  interrupted, terminated: the same command goes on
  141      whoever read stdout went away
"""

Checkpoint = Annotated[
    str, typer.Option("-c", "--checkpoint", help="timm model, local folder, weights file (with --arch) or hub id.")
]
Arch = Annotated[str | None, typer.Option(help="timm architecture, for a bare weights file.")]
RandomInit = Annotated[bool, typer.Option("--random-init", help="Random weights instead of trained ones.")]
Seed = Annotated[int, typer.Option(help="Of the random weights.")]
FilesFrom = Annotated[str | None, typer.Option(help="A list of paths or URLs of images, one a line; - is stdin.")]
Null = Annotated[bool, typer.Option("-0", "--null", help="Names in the list end in a zero byte.")]
Root = Annotated[
    str | None, typer.Option(help="Folder or URL that listed names, and their keys, are relative to. Default: here.")
]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Listed names may lead out of that folder; their keys are whole paths.")
]
FollowLinks = Annotated[bool, typer.Option("--follow-links", help="Look into folders that are links, too.")]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; cuda:0,cuda:1 or cuda:all for a process each.")
]
Incomplete = Annotated[
    bool, typer.Option("--incomplete", help="Take what is there of a dump that still misses shards.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")]
OutIndices = Annotated[
    str | None, typer.Option(help="Stages by index, such as 1,2,-1, or all. Default: the last stage.")
]
OutFeatures = Annotated[
    str | None, typer.Option(help="Stages by name, such as stem,stage2 or stage2:stage4 (both ends) or all.")
]
NumChannels = Annotated[
    int | None, typer.Option(help="Of the input: 1 is grey. Default: the checkpoint's own, 3 as a rule.")
]
Norm = Annotated[
    str | None,
    typer.Option(help="Maps before (raw) or after (model) the model's final norm. Default: as its library gives them."),
]
ImageSize = Annotated[
    str | None, typer.Option(help="Input size N or HxW; with --fit native the most. Default: the checkpoint's own.")
]
Fit = Annotated[
    str | None,
    typer.Option(help=f"How pictures get that size: {', '.join(FITS)} (each its own). Default: the checkpoint's way."),
]
Orientation = Annotated[str, typer.Option(help="What EXIF says about which way is up: apply, ignore.")]
Alpha = Annotated[str, typer.Option(help="What becomes of transparency: drop, white, black.")]
DepthRange = Annotated[
    str | None,
    typer.Option(help="Black and white of pictures deeper than 8 bits, such as 0:4095. Default: all of 16 bits."),
]
Decode = Annotated[
    str, typer.Option(help="exact; or scaled: large JPEGs are unpacked smaller, which is faster and nearly the same.")
]
MaxPixels = Annotated[int, typer.Option(help="Larger pictures are failures.")]
Dtype = Annotated[str, typer.Option(help=f"Type that is stored: {', '.join(DTYPES)}.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
