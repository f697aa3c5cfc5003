"""Check buffers, and the order of copies on a GPU with a stand-in for torch.cuda, because no test may need a GPU."""

import mmap
import weakref
from contextlib import contextmanager

import pytest
import torch

from featcli.errors import MachineError
from featcli.run.transfers import Buffers, CudaTransfers, Transfers


def test_buffers_start_on_a_page():
    """Buffers start on a page, so that the disk can read from them without a copy."""
    assert Buffers().take("stage1", 5000).data_ptr() % 4096 == 0


def test_buffers_are_used_again():
    """Only a buffer that was given back is taken again."""
    buffers = Buffers()
    one, other = buffers.take("stage1", 100), buffers.take("stage1", 100)
    assert one.data_ptr() != other.data_ptr()
    buffers.give_back("stage1", one)
    assert buffers.take("stage1", 80).data_ptr() == one.data_ptr()
    assert buffers.take("stage1", 80).data_ptr() not in (one.data_ptr(), other.data_ptr())


def test_no_memory_for_buffers(monkeypatch):
    """A lack of memory for buffers is reported as such, and not as an error of the disk."""

    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MachineError, match="100 bytes for rows that are to be written do not fit into the memory"):
        Buffers().take("stage1", 100)


def test_buffers_that_became_too_small_are_let_go():
    """A larger map gets a larger buffer, and the small one is dropped."""
    buffers = Buffers()
    small = buffers.take("stage1", 10)
    kept = weakref.ref(small)
    buffers.give_back("stage1", small)
    del small
    assert kept() is not None
    assert len(buffers.take("stage1", 20)) >= 20
    assert kept() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_are_cast_and_laid_out_as_torch_does(dtype, layout):
    """One copy gives, bit for bit, what a cast and then a layout give."""
    values = torch.randn(3, 5, 7, 6).mul(1000).contiguous(memory_format=layout)
    target = torch.empty(values.shape, dtype=dtype)
    ends = Transfers(torch.device("cpu")).to_host(values, target)
    assert torch.equal(target, values.to(dtype).contiguous())
    assert ends.tolist() == [target.min(), target.max()]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_the_extremes(bad):
    """The extremes are finite exactly if all values are."""
    values = torch.randn(3, 5, 7, 6)
    values[1, 2, 3, 4] = bad
    assert not Transfers(torch.device("cpu")).to_host(values, torch.empty(values.shape)).isfinite().all()


class Cuda:
    """Streams and events that write down what is asked of them."""

    def __init__(self):
        self.log = []
        self.current = "compute"

    def Stream(self, device):  # noqa: N802
        return Stream(self, ["in", "out"][sum(what == "stream" for what, *_ in self.log)])

    def Event(self, enable_timing=False, blocking=False):  # noqa: N802
        return Event(self)

    def current_stream(self, device):
        return self.current

    @contextmanager
    def device(self, device):
        self.log.append(("current device", device))
        yield

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name
        cuda.log.append(("stream", name))

    def wait_stream(self, other):
        self.cuda.log.append(("waits", self.name, other))


class Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self, stream):
        self.name = getattr(stream, "name", stream)
        self.cuda.log.append(("record", self.name))

    def synchronize(self):
        self.cuda.log.append(("wait for", self.name))

    def elapsed_time(self, other):
        assert ("wait for", other.name) in self.cuda.log, "CUDA raises where an event has not come about"
        return 1500.0


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda _, stream: cuda.log.append(("keep for", getattr(stream, "name", stream)))
    )
    copy, to = torch.Tensor.copy_, torch.Tensor.to

    def logged_copy(target, *args, **options):
        if options.get("non_blocking"):
            cuda.log.append(("copy", cuda.current))
        return copy(target, *args, **options)

    def logged_to(tensor, *args, **options):
        if options.get("non_blocking"):
            cuda.log.append(("copy", cuda.current))
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", logged_copy)
    monkeypatch.setattr(torch.Tensor, "to", logged_to)
    return cuda


def test_the_order_of_a_batch_on_a_gpu(cuda):
    """Pixels arrive before their buffer is free, rows leave after they are computed, and memory lives as long."""
    transfers = CudaTransfers(torch.device("cpu"), cuda)
    cuda.log.clear()
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert torch.equal(transfers.to_device(pixels), pixels)
    assert cuda.log == [("copy", "in"), ("record", "in"), ("wait for", "in"), ("keep for", "compute")]

    cuda.log.clear()
    since = transfers.mark()
    values, target = torch.randn(2, 5, 4, 4), torch.empty(2, 5, 4, 4, dtype=torch.float16)
    ends = transfers.to_host(values, target)
    arrive = transfers.arrival(since)
    assert cuda.log == [
        ("record", "compute"),
        ("waits", "out", "compute"),
        ("copy", "out"),
        ("copy", "out"),
        ("keep for", "out"),
        ("keep for", "out"),
        ("record", "compute"),
        ("record", "out"),
    ]
    cuda.log.clear()
    assert arrive() == 1.5
    assert cuda.log == [("current device", torch.device("cpu")), ("wait for", "out"), ("wait for", "compute")]
    assert torch.equal(target, values.half())
    assert ends.tolist() == [target.min(), target.max()]
