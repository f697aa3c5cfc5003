"""The options that commands have in common, each with its help; defaults and checks are config.py's."""

from __future__ import annotations

from typing import Annotated

import typer

from featcli.config import DTYPES

Checkpoint = Annotated[
    str, typer.Option("-c", "--checkpoint", help="timm model, local folder, weights file (with --arch) or hub id.")
]
Arch = Annotated[str | None, typer.Option(help="timm architecture, for a bare weights file.")]
RandomInit = Annotated[bool, typer.Option("--random-init", help="Random weights instead of trained ones.")]
Seed = Annotated[int, typer.Option(help="Of the random weights.")]
FilesFrom = Annotated[str | None, typer.Option(help="A list of images, one a line; - is stdin.")]
Null = Annotated[bool, typer.Option("-0", "--null", help="Names in the list end in a zero byte.")]
Root = Annotated[
    str | None, typer.Option(help="Folder that listed names, and their keys, are relative to. Default: here.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
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
ImageSize = Annotated[str | None, typer.Option(help="Input size N or HxW. Default: the checkpoint's own.")]
Dtype = Annotated[str, typer.Option(help=f"Type that is stored: {', '.join(DTYPES)}.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
