"""Threads: as many as the process may use, asleep while they wait; the user's own settings are kept."""

import os
import subprocess
import sys

import pytest

from olmoscope.threads import usable_processors

LOOK = ("import olmoscope, os, torch; print(torch.get_num_threads(), "
        "os.environ['RAYON_NUM_THREADS'], os.environ['OMP_WAIT_POLICY'])")


def look(**environment):
    """What a new process has."""
    mine = {name: value for name, value in os.environ.items()
            if name not in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", LOOK], env=mine | environment, capture_output=True, text=True,
                          check=True)
    return done.stdout.split()


def test_the_affinity_is_kept():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_processors() == 1
        assert look() == ["1", "1", "PASSIVE"]
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("content", "count"), [
    ("", 16), ("max 100000\n", 16), ("150000 100000\n", 2), ("400000 100000\n", 4), ("1000 100000\n", 1),
    ("6400000 100000\n", 16)])
def test_a_container_may_have_a_quota(content, count, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    (tmp_path / "cpu.max").write_text(content)
    assert usable_processors(tmp_path / "cpu.max") == count
    assert usable_processors(tmp_path / "absent") == 16


def test_what_the_user_says_is_kept():
    assert look(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="3", OMP_WAIT_POLICY="ACTIVE") == ["1", "3", "ACTIVE"]
