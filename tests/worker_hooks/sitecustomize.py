"""Make workers of the tests die or wait, in every process that has this folder in PYTHONPATH.

- DIES_AT=KEY kills the process when it reads that image; with DIES_ONCE=FILE only the first time.
- WAITS_AT=KEY and WAITS_FOR=FILE read images from that key on only once the file exists.
- KEEPS_EVERY=SECONDS puts the rows of an unfinished shard on the disk this often, instead of each minute.
"""

import os
import signal
import time
from pathlib import Path

if {"DIES_AT", "WAITS_AT"} & os.environ.keys():
    from featcli.pixels import decode

    whole = decode.read_pixels

    def read_pixels(image, *rest):
        if image.key == os.environ.get("DIES_AT"):
            once = os.environ.get("DIES_ONCE")
            if once is None or not Path(once).exists():
                if once is not None:
                    Path(once).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        while image.key >= os.environ.get("WAITS_AT", "~") and not Path(os.environ["WAITS_FOR"]).exists():
            time.sleep(0.02)
        return whole(image, *rest)

    decode.read_pixels = read_pixels

if "KEEPS_EVERY" in os.environ:
    from featcli.run import sink

    sink.KEEP_SECONDS = float(os.environ["KEEPS_EVERY"])
