"""Write one array in numpy's own format. https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from featcli.errors import UsageError, shown
from featcli.export.content import Content

DTYPES = ("float32", "float16")


def write(content: Content, path: Path) -> None:
    """Write content with a single stage. See formats.Format."""
    stage = content.outputs[0]
    if stage.is_ragged:
        raise UsageError(
            f"stage {shown(stage.name)}: maps of many sizes cannot form one array",
            "give --pool avg or 7x7, or another format",
        )
    with path.open("wb") as file:
        shape = (len(content.rows), *stage.shape_at((0, 0)))
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(stage.dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for run in content.runs():
            file.write(np.ascontiguousarray(run.maps[stage.name]).data)
