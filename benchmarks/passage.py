"""Trace what one image passes from its file to the record of its shard: functions and modules of the package.

`PYTHONPATH=TREE python benchmarks/passage.py TREE` prints a line of JSON, which structure.py makes a part of its table:
[functions, modules] for `whole`, the whole command, and for `way`, the image's own way.

One command is run and traced in all its threads: `extract` of a single JPEG with a small network of random weights. The
trace counts functions of the package that are called, also lambdas and generators, but no comprehensions and no bodies
of modules and classes. Modules are those of the functions. The image's own way begins when its file is first opened
(the other threads get a moment to come to rest), and ends when the shard's record gets its name. It consists of what is
called between the two, in any thread, and of what is on the stack of the thread that opens the file. Callers elsewhere
that only wait for what they have called are not on its way.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

PACKAGE, IMAGE, RECORD = "featcli", Path("sample_images/nature/sea.jpg"), "00000.json"
COMMAND = (
    "-c test_resnet --random-init --image-size 64 --threads 1 --decode-threads 1 --batch-size 1"
    " --layout channels-first --no-fold --device cpu -q"
)
REST = 0.5  # seconds in which the other threads come to wait for the image


class Trace:
    """The code that a command passes, and that one image passes in it."""

    def __init__(self):
        self.whole, self.way = {}, {}  # by the number of the code, which is kept because another could get its number
        self.began = self.ended = False
        self._is_under_way = False

    def note(self, frame, event, _):
        if event == "call":
            self.whole[id(frame.f_code)] = frame.f_code
            if self._is_under_way:
                self.way[id(frame.f_code)] = frame.f_code

    def heed(self, event, arguments):
        if event == "open" and not self.began and not isinstance(arguments[0], int):
            self.began = os.fsdecode(arguments[0]).endswith(IMAGE.name)
            if self.began:
                time.sleep(REST)
                frame = sys._getframe(1)
                while frame is not None:
                    self.way[id(frame.f_code)] = frame.f_code
                    frame = frame.f_back
                self._is_under_way = True
        elif event in ("os.rename", "os.link") and Path(os.fsdecode(arguments[1])).name == RECORD:
            self.ended, self._is_under_way = True, False


def count(codes, tree):
    """Return how many functions there are, and of how many modules."""
    functions = [
        code
        for code in codes.values()
        if code.co_filename.startswith(os.path.join(tree, PACKAGE, ""))
        and code.co_flags & inspect.CO_OPTIMIZED  # modules and classes lack this flag
        and (code.co_name == "<lambda>" or not code.co_name.startswith("<"))
    ]
    return len(functions), len({code.co_filename for code in functions})


def main():
    tree, trace, code = Path(sys.argv[1]).resolve(), Trace(), None
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        sys.addaudithook(trace.heed)
        threading.setprofile(trace.note)
        sys.setprofile(trace.note)
        try:
            from featcli.cli import main as run

            run(["extract", str(tree / IMAGE), "-o", str(Path(scratch) / "dump"), *COMMAND.split()])
        except SystemExit as ending:
            code = ending.code
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    assert (trace.began, trace.ended, code) == (True, True, 0), (trace.began, trace.ended, code)
    print(json.dumps({"whole": count(trace.whole, tree), "way": count(trace.way, tree)}))


if __name__ == "__main__":
    main()
