"""The background writer is bounded and writes in order; a failure on either side is reported and never hangs."""

import threading
import time

import pytest

from olmoscope.activations.store import writer as writer_module
from olmoscope.activations.store.writer import Writer


def test_every_job_is_done_in_order_with_no_more_buffers_than_there_are():
    done, lent, most = [], set(), 0
    with Writer(["a", "b"]) as writer:
        for number in range(20):
            buffer = writer.buffer()
            lent.add(buffer)
            most = max(most, len(lent))

            def job(go_on, number=number, buffer=buffer):
                time.sleep(0.002)
                done.append(number)
                lent.discard(buffer)

            writer.write(buffer, job)
    assert done == list(range(20))
    assert most == 2


def test_it_blocks_while_all_buffers_are_being_written():
    gate = threading.Event()
    with Writer(["a", "b"]) as writer:
        for _ in range(2):
            writer.write(writer.buffer(), lambda go_on: gate.wait(10))
        threading.Timer(0.2, gate.set).start()
        start = time.monotonic()
        writer.buffer()
        assert time.monotonic() - start > 0.15


def fail(go_on):
    raise OSError("the disk is gone")


def test_an_error_of_the_writer_ends_the_run():
    with pytest.raises(OSError, match="the disk is gone"), Writer(["a", "b"]) as writer:
        writer.write(writer.buffer(), fail)
    with pytest.raises(OSError, match="the disk is gone"), Writer(["a"]) as writer:
        writer.write(writer.buffer(), fail)
        writer.buffer()
        pytest.fail("a buffer whose write failed was lent again")
    with pytest.raises(OSError, match="the disk is gone"), Writer(["a", "b"]) as writer:
        writer.write(writer.buffer(), fail)
        for _ in range(1000):
            writer.check()
            time.sleep(0.01)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_run_lets_the_write_in_progress_end(error):
    done = []
    with pytest.raises(error), Writer(["a", "b"]) as writer:
        writer.write(writer.buffer(), lambda go_on: (time.sleep(0.2), done.append(1)))
        raise error
    assert done == [1]


def test_a_write_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(writer_module, "GRACE", 0.1)
    steps = []

    def endless(go_on):
        while True:
            go_on()
            steps.append(1)
            time.sleep(0.01)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Writer(["a", "b"]) as writer:
        writer.write(writer.buffer(), endless)
        writer.write(writer.buffer(), endless)
        raise KeyboardInterrupt
    assert 0.05 < time.monotonic() - start < 1
    assert steps
