"""Progress without a terminal: plain lines, at most one every 10 s, by the test's own clock."""

import io

import pytest
from rich.console import Console

from olmoscope import progress
from olmoscope.units import format_seconds


@pytest.fixture
def clock(monkeypatch):
    """A list whose one number is the time."""
    now = [1000.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def log(monkeypatch):
    """The output without a terminal."""
    return printed(monkeypatch, force_terminal=False)


def printed(monkeypatch, **settings):
    console = Console(file=io.StringIO(), width=40, **settings)
    monkeypatch.setattr(progress, "console", console)
    return lambda: console.file.getvalue().splitlines()


def test_a_line_every_ten_seconds_and_one_at_the_end(clock, log):
    with progress.bar("collecting", 400_000, "tokens") as advance:
        for _ in range(100):
            clock[0] += 0.25
            advance(4000)
    assert log() == [
        "collecting: 40%, 160k of 400k tokens, 16k tokens/s, about 15 s left",
        "collecting: 80%, 320k of 400k tokens, 16k tokens/s, about 5 s left",
        "collecting: 100%, 400k of 400k tokens, 16k tokens/s, took 25 s",
    ]


def test_a_short_job_has_one_line_and_an_empty_one_none(clock, log):
    with progress.bar("counting", 10, "features") as advance:
        clock[0] += 2
        advance(10)
    with progress.bar("training", 500, "tokens", done=500):
        clock[0] += 60
    assert log() == ["counting: 100%, 10 of 10 features, 5 features/s, took 2 s"]


def test_nobody_knows_how_much_there_is(clock, log):
    with progress.bar("downloading", None, "bytes") as advance:
        for _ in range(3):
            clock[0] += 6
            advance(6e6)
    assert log() == ["downloading: 12M bytes, 1M bytes/s", "downloading: 18M bytes, 1M bytes/s, took 18 s"]


def test_what_an_earlier_run_did_counts_in_the_share_and_not_in_the_rate(clock, log):
    with progress.bar("training", 1000, "tokens", done=500) as advance:
        clock[0] += 10
        advance(100, "loss 0.5 [L0 32]")
        clock[0] += 5
        advance(400)
    assert log() == ["training: 60%, 600 of 1k tokens, 10 tokens/s, about 40 s left, loss 0.5 [L0 32]",
                     "training: 100%, 1k of 1k tokens, 33.3 tokens/s, took 15 s, loss 0.5 [L0 32]"]


def test_the_rate_of_a_line_is_a_recent_one(clock, log):
    with progress.bar("training", 1_000_000, "tokens") as advance:
        for seconds, amount in [(60, 100), (10, 10_000), (10, 10_000), (10, 10_000), (10, 10_000)]:
            clock[0] += seconds
            advance(amount)
    rates = [line.split(", ")[2] for line in log()]
    assert rates == ["1.67 tokens/s", "144 tokens/s", "251 tokens/s", "1k tokens/s", "1k tokens/s", "401 tokens/s"]


def test_more_than_expected_is_not_over_the_whole(clock, log):
    with progress.bar("packing", 100, "tokens") as advance:
        clock[0] += 10
        advance(110)
    assert log() == ["packing: 100%, 110 of 100 tokens, 11 tokens/s, took 10 s"]


def test_a_job_that_fails_says_how_far_it_came(clock, log):
    with pytest.raises(KeyboardInterrupt), progress.bar("collecting", 100, "tokens") as advance:
        clock[0] += 4
        advance(20)
        raise KeyboardInterrupt
    assert log() == ["collecting: 20%, 20 of 100 tokens, 5 tokens/s, took 4 s"]


def test_a_job_that_is_not_counted(clock, log):
    with progress.step_line("compiling kernels, once"):
        assert log() == ["compiling kernels, once ..."]
        clock[0] += 28
    assert log()[1:] == ["compiling kernels, once: took 28 s"]
    with pytest.raises(ValueError), progress.step_line("compiling"):
        raise ValueError
    assert log()[2:] == ["compiling ..."]


def test_a_terminal_has_a_bar_and_a_spinner(clock, monkeypatch):
    text = printed(monkeypatch, force_terminal=True)
    with progress.bar("collecting", 100, "tokens") as advance:
        clock[0] += 60
        advance(50)
    assert "━" in "".join(text()) and "took" not in "".join(text())
    with progress.step_line("compiling kernels, once"):
        clock[0] += 90
    assert text()[-1].endswith("compiling kernels, once: took 1 min 30 s")


def test_seconds_for_people():
    assert [format_seconds(each) for each in (0.001, 0.04, 9.94, 9.96, 59.7, 3599.6, 7500)] == [
        "0 s", "0.04 s", "9.9 s", "10 s", "1 min 0 s", "1 h 0 min", "2 h 5 min"]
