import threading

import numpy as np
import pytest

from conftest import draw
from featcli.inputs.listing import find
from featcli.pixels import batches
from featcli.pixels.sizes import Sizes
from featcli.spec.groups import InputSpec, PixelSpec

SIZE = (8, 10)


class Pixels:
    channels = 3
    dtype = "uint8"
    is_native = False

    def fit(self, picture):
        return np.asarray(picture.resize(SIZE[::-1])).transpose(2, 0, 1)

    def fit_for(self, decode):
        return self.fit


def listing(folder, count):
    for i in range(count):
        draw(folder / f"{i:03d}.png", i)
    return pictures(folder)


def pictures(folder):
    return batches.SizedImages(find(InputSpec([str(folder)])).images, Sizes(SIZE))


def read(images, ranges, threads):
    return batches.read(batches.Decoder(PixelSpec(), Pixels(), threads), ((images, rows) for rows in ranges))


def ranges(count, size):
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_every_image_once_in_order(tmp_path, threads, size):
    """Batches come in order and hold each image at its row, for any batch size and number of threads."""
    images = listing(tmp_path, 23)
    seen = []
    for batch in read(images, ranges(23, size), threads):
        assert batch.pixels.shape == (len(batch.rows), 3, *SIZE)
        seen += [pixels.clone().numpy() for pixels in batch.pixels]
    assert len(seen) == 23
    for row, pixels in enumerate(seen):
        assert np.array_equal(pixels, expected_pixels(images.images[row].path))


def expected_pixels(path):
    from conftest import upright

    return Pixels().fit(upright(path))


def test_a_broken_image_changes_no_other(tmp_path):
    """A broken image is named with its row, its pixels are zero, and its neighbours stay the same."""
    images = listing(tmp_path, 9)
    (tmp_path / "004.png").write_bytes(b"nothing")
    images = pictures(tmp_path)
    for batch in read(images, ranges(9, 3), 2):
        for row, pixels in zip(batch.rows, batch.pixels, strict=True):
            if row == 4:
                assert not pixels.any()
            else:
                assert np.array_equal(pixels.numpy(), expected_pixels(images.images[row].path))
        failed = [(f.row, f.key, f.reason) for f in batch.failures]
        assert failed == ([(4, "004.png", "not_an_image")] if 4 in batch.rows else [])


def test_buffers_are_used_again(tmp_path):
    """Memory does not grow with the number of batches."""
    images = listing(tmp_path, 40)
    places = {batch.pixels.data_ptr() for batch in read(images, ranges(40, 2), 2)}
    assert len(places) <= batches.AHEAD + 1


def test_stopping_early_leaves_no_threads(tmp_path):
    """When the reader is dropped halfway, its threads end."""
    images = listing(tmp_path, 20)
    reading = read(images, ranges(20, 2), 2)
    next(reading)
    reading.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_ranges_are_asked_for_late(tmp_path):
    """Only a few batches are prepared ahead, however long the run is."""
    images, asked = listing(tmp_path, 30), []

    def lazily():
        for rows in ranges(30, 1):
            asked.append(rows)
            yield rows

    next(read(images, lazily(), 1))
    assert len(asked) <= batches.AHEAD + 1


def test_a_busy_decoder_is_left_behind(tmp_path):
    """An interruption arrives although one decoder does not end, and idle threads end."""
    go_on, begun = threading.Event(), threading.Event()

    class Busy(Pixels):
        def fit(self, picture):
            begun.set()
            go_on.wait()
            return super().fit(picture)

    images = listing(tmp_path, 9)
    decoder = batches.Decoder(PixelSpec(), Busy(), 2)

    def interrupted():
        yield images, range(1)
        begun.wait()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(batches.read(decoder, interrupted()))
    busy = [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    go_on.set()
    for thread in busy:
        thread.join(30)
    assert len(busy) == 1
    assert not busy[0].is_alive()
