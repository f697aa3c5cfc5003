"""What makes workers of the tests die or wait, in every process that has this folder in PYTHONPATH.

DIES_AT=KEY: the process is killed when it reads that image; with DIES_ONCE=FILE the first time alone.
WAITS_AT=KEY, WAITS_FOR=FILE: images from that key on are read once the file is there.
KEEPS_EVERY=SECONDS: so often the rows of an unfinished shard are put on the disk, in place of each minute.
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
