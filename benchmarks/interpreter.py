"""Measure how many images a second pass through one interpreter, by threads and by processes that decode.

Each file is a JPEG of 8x8 pixels, which goes the whole way of a picture: opened, checked, unpacked. What a larger one
would cost outside of the interpreter's lock is replaced by a wait (2.6 ms, about what a JPEG of 500x375 takes), and the
backbone takes nothing. So only the lock keeps the threads from the pace at which they could wait. Ways are taken in
turn; the ratio is that of rates within a round, as a median. `--wait 0` tells what an image costs by itself: with
several threads, and as long as there is a core that is idle, the time of an image is the time under the lock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from host import described
from PIL import Image

from featcli.inputs.listing import find
from featcli.pixels.batches import SizedImages, read
from featcli.pixels.decoder import Decoder
from featcli.pixels.sizes import Sizes
from featcli.spec.groups import InputSpec, PixelSpec
from featcli.system.threads import DecodeThreads


class Waits:
    """A preprocessing that waits, and gives pixels that nobody computed."""

    channels, dtype, is_native = 3, "uint8", False

    def __init__(self, seconds):
        self.seconds = seconds

    def fit_for(self, decode):
        pixels = np.zeros((3, 224, 224), np.uint8)

        def fit(picture):
            wait(self.seconds)
            return pixels

        return fit


def wait(seconds):
    if seconds:
        time.sleep(seconds)


def rate(decoder, images, batch_size):
    """Return images a second and this process's own seconds for each.

    Both are counted from the end of the first batch on, so that the start of processes does not count.
    """
    sized = SizedImages(images, Sizes((224, 224)))
    batches = ((sized, range(row, min(row + batch_size, len(images)))) for row in range(0, len(images), batch_size))
    began, own, count = 0.0, 0.0, 0
    for batch in read(decoder, batches):
        assert not batch.failures, batch.failures[0]
        if not began:
            began, own = time.perf_counter(), time.process_time()
        else:
            count += len(batch.rows)
    return count / (time.perf_counter() - began), (time.process_time() - own) / count


def only_waiting(threads, seconds, count):
    """Return how often a second threads can wait that do nothing else."""
    with DecodeThreads(threads, "wait") as pool:
        began = time.perf_counter()
        pool.map(wait, [seconds] * count)
        return count / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--threads", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--processes", type=int, nargs="+", default=[0])
    parser.add_argument("--wait", type=float, default=0.0026, help="seconds")
    parser.add_argument("--decode", nargs="+", default=["exact", "fast"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    print(f"{described()}, medians of {chosen.rounds}")
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(chosen.images):
            Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(Path(scratch) / f"{number:05d}.jpg")
        images = find(InputSpec((scratch,))).images
        for decode in chosen.decode:
            for threads in chosen.threads:
                ways = {}
                for _ in range(chosen.rounds):
                    alone = only_waiting(threads, chosen.wait, chosen.images) if chosen.wait else float("nan")
                    for processes in chosen.processes:
                        decoder = Decoder(PixelSpec(decode=decode), Waits(chosen.wait), threads, processes=processes)
                        found, own = rate(decoder, images, chosen.batch_size)
                        ways.setdefault(processes, []).append((found, found / alone, own))
                for processes, rounds in ways.items():
                    rates, ratios, own = (statistics.median(one) for one in zip(*rounds, strict=True))
                    print(
                        f"{decode:<6} {threads:3} threads, {processes} processes: {rates:6.0f} images/s,"
                        f" {1e6 / rates:5.0f} us each, {1e6 * own:4.0f} us of this process,"
                        f" {ratios:.2f} of those that only wait",
                        flush=True,
                    )


if __name__ == "__main__":
    import interpreter  # processes that decode find Waits there, and not in __main__

    interpreter.main()
