import threading
import weakref
from functools import partial

import pytest

from featcli.run.background import Background


def test_work_is_done_in_order():
    """All work is done in the order in which it was given."""
    done = []
    with Background(10) as background:
        for i in range(100):
            background.give(lambda i=i: done.append(i), 3)
    assert done == list(range(100))


def test_an_error_reaches_the_giver_and_stops_the_rest():
    """The first exception is raised to whoever gives more work, or at the end, and no work after it is done."""
    done = []

    def broken():
        raise OSError(28, "full")

    with pytest.raises(OSError, match="full"), Background(10) as background:
        background.give(broken)
        background.give(lambda: done.append(1))
    assert done == []


def test_memory_that_waits_is_bounded():
    """A call waits while more than the limit is queued, and returns once there is room."""
    started, go_on, queued = threading.Event(), threading.Event(), []

    def slow():
        started.set()
        go_on.wait()

    with Background(10) as background:
        background.give(slow, 8)
        started.wait()
        background.give(lambda: None, 2)

        def give_more():
            background.give(lambda: None, 8)
            queued.append(True)

        giver = threading.Thread(target=give_more)
        giver.start()
        before = list(queued)
        go_on.set()
        giver.join()
        assert (before, queued) == ([], [True])


def test_one_piece_larger_than_the_limit_still_passes():
    """A single piece of work above the limit is done, and does not wait for ever."""
    done = []
    with Background(1) as background:
        background.give(lambda: done.append(1), 100)
        background.give(lambda: done.append(2), 100)
    assert done == [1, 2]


def test_what_was_given_is_done_though_the_giver_fails():
    """If the giver is interrupted, the work that it gave is done before the thread ends."""
    before, started, go_on, done = threading.enumerate(), threading.Event(), threading.Event(), []

    def until_it_may():
        started.set()
        done.append(go_on.wait(60))

    with pytest.raises(KeyboardInterrupt), Background(10) as background:
        background.give(until_it_may)
        started.wait()
        background.give(lambda: done.append("the next"))
        background.give(go_on.set)
        go_on.set()
        raise KeyboardInterrupt
    assert done == [True, "the next"]
    assert threading.enumerate() == before


def test_the_error_of_the_giver_is_what_is_heard():
    """If the giver and its work both fail, the giver's own error is raised."""

    def broken():
        raise OSError(28, "full")

    with pytest.raises(KeyboardInterrupt), Background(10) as background:
        background.give(broken)
        raise KeyboardInterrupt


def test_a_second_interrupt_drops_what_waits(monkeypatch):
    """A second interruption drops work that has not begun."""
    started, dropped, done = threading.Event(), threading.Event(), []

    def until_the_next_is_dropped():
        started.set()
        done.append(dropped.wait(60))

    def give_next():
        work = partial(done.append, "the next")
        weakref.finalize(work, dropped.set)  # runs once nobody can do that work any more
        background.give(work)

    join, joins = threading.Thread.join, []

    def interrupted_once(thread, timeout=None):
        joins.append(thread)
        if len(joins) == 1:
            raise KeyboardInterrupt
        join(thread, timeout)

    with pytest.raises(KeyboardInterrupt), Background(10) as background:
        background.give(until_the_next_is_dropped)
        started.wait()
        give_next()
        monkeypatch.setattr(threading.Thread, "join", interrupted_once)
        raise KeyboardInterrupt
    assert done == [True]
