"""Collection under real faults: killed, interrupted, out of disk, run twice. The finished store is always the same."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from commands import Commands
from helpers import recipe, write_documents
from olmoscope.files import files_below, locked, sha256

SEGMENTS = 51


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A recipe file: many segments, little to compute."""
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=200)
    path = folder / "recipe.yaml"
    path.write_text(recipe(
        folder / "corpus", tokens__count=9000, tokens__segment_rows=230, activations__layers=[0, 1],
        saes=[{"layer": 0, "d_sae": 512, "k": 8}, {"layer": 1, "d_sae": 512, "k": 8}]).to_yaml())
    return path


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("outputs"))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def whole(job, commands, tmp_path_factory):
    """The files of an uninterrupted collection."""
    out = tmp_path_factory.mktemp("whole")
    status, output = commands.run("collect", job, "-o", out)
    assert status == 0, output
    assert len(segments(out)) == SEGMENTS
    return content(out)


def segments(out):
    return list((out / "store" / "train" / "checksums").glob("segment-*.json"))


def content(out):
    """Every file except locks, so a half-written one would show."""
    return {str(path.relative_to(out)): sha256(path) for path in sorted(out.rglob("*"))
            if path.is_file() and not path.name.startswith(".lock")}


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)  # a look at all files takes as long


def wait_within(folder, commands, pid, seconds):
    """Wait for a random moment, but not for a second segment, or a fast machine would finish before all kills."""
    before, end = len(segments(folder)), time.monotonic() + seconds
    while (status := commands.wait(pid, 0.005)) is None and time.monotonic() < end:
        if len(segments(folder)) > before:
            break
    return status


def test_25_kills_at_random_moments(job, commands, whole, tmp_path):
    """Five kills while tokens are packed, ten at any moment of a run, ten soon after a segment was finished."""
    random = np.random.default_rng(0)
    for kill in range(25):
        pid, output = commands.start("collect", job, "-o", tmp_path)
        if kill < 5:
            files = tmp_path / "store" / "train" / "tokens"
            before = len(list(files.glob("*")))
            wait_for(lambda before=before, files=files: len(list(files.glob("*"))) > before)
            status = commands.wait(pid, random.uniform(0, 0.02))
        elif kill % 2:
            status = wait_within(tmp_path, commands, pid, random.uniform(0, 1.0))
        else:
            before = len(segments(tmp_path))
            wait_for(lambda before=before: len(segments(tmp_path)) > before)
            status = wait_within(tmp_path, commands, pid, random.uniform(0, 0.2))
        assert status is None, f"it ended before it was killed ({kill} kills): {output.read_text()}"
        os.kill(pid, signal.SIGKILL)
        assert commands.wait(pid) == -signal.SIGKILL
    assert 10 <= len(segments(tmp_path)) < SEGMENTS
    status, output = commands.run("collect", job, "-o", tmp_path)
    assert status == 0, output
    assert content(tmp_path) == whole
    status, output = commands.run("collect", job, "-o", tmp_path)
    assert (status, content(tmp_path)) == (0, whole), output


def held_while_writing(pid, folder):
    """Stop a process while one of its files in a folder is half-written; False if it ended first."""
    def process_state():
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    def half_written():
        return any(folder.glob(f".*.{pid}.tmp"))

    end = time.monotonic() + 60
    while process_state() not in "ZX":
        assert time.monotonic() < end, "it neither ended nor wrote"
        if half_written():
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: process_state() in "TZX")
            if half_written() and process_state() == "T":  # it may have been renamed just before the stop
                return True
            os.kill(pid, signal.SIGCONT)
    return False


@pytest.mark.parametrize("folder", ["tokens", "layer_01", "checksums"])
def test_killed_in_the_middle_of_a_file(folder, job, commands, whole, tmp_path):
    """Half-written files that a kill leaves are found, never read, and gone when the collection is done."""
    kills = 0
    while kills < 2:
        pid, output = commands.start("collect", job, "-o", tmp_path)
        if not held_while_writing(pid, tmp_path / "store" / "train" / folder):
            break
        os.kill(pid, signal.SIGKILL)
        assert commands.wait(pid) == -signal.SIGKILL
        assert list((tmp_path / "store" / "train" / folder).glob("*.tmp"))
        kills += 1
    assert kills, f"no writing of a file was seen: {output.read_text()}"
    status, output = commands.run("collect", job, "-o", tmp_path)
    assert status == 0, output
    assert content(tmp_path) == whole


def test_a_lost_worker_s_share_is_done_by_another(job, commands, whole, tmp_path):
    lost, _ = commands.start("collect", job, "-o", tmp_path, "--worker", "1/2")
    pid, output = commands.start("collect", job, "-o", tmp_path, "--worker", "0/2")
    wait_for(lambda: any(int(path.stem[-6:]) % 2 for path in segments(tmp_path)))
    os.kill(lost, signal.SIGKILL)
    assert commands.wait(lost) == -signal.SIGKILL
    assert commands.wait(pid) == 0
    done = {int(path.stem[-6:]) for path in segments(tmp_path)}
    assert {segment for segment in range(SEGMENTS) if segment % 2 == 0} <= done
    assert 1 < SEGMENTS - len(done) < SEGMENTS // 2
    assert f"{SEGMENTS - len(done)} of {SEGMENTS} segments belong to other workers" in " ".join(
        output.read_text().split())
    status, output = commands.run("collect", job, "-o", tmp_path)
    assert status == 0, output
    assert content(tmp_path) == whole


def test_workers_of_different_numbers_at_the_same_time(job, commands, whole, tmp_path):
    """Shares of 2 and of 3 overlap; each segment is made once, by whoever claims it first."""
    pids = [commands.start("collect", job, "-o", tmp_path, "--worker", share)[0]
            for share in ("0/2", "1/2", "0/3", "2/3")]
    assert [commands.wait(pid) for pid in pids] == [0] * 4
    assert content(tmp_path) == whole


def test_two_processes_on_the_same_share(job, commands, whole, tmp_path):
    first, _ = commands.start("collect", job, "-o", tmp_path)
    wait_for(lambda: (tmp_path / "store" / "train" / "tokens").exists())
    status, output = commands.run("collect", job, "-o", tmp_path)
    assert status == 1
    assert output.startswith("error: another process is collecting in ")
    assert output.count("\n") == 1
    assert commands.wait(first) == 0
    assert content(tmp_path) == whole


def test_a_worker_waits_for_the_tokens(job, commands, whole, tmp_path):
    with locked(tmp_path / "store" / "train", "packing", ".lock-tokens"):
        pid, output = commands.start("collect", job, "-o", tmp_path)
        wait_for(lambda: "another process is packing the tokens" in output.read_text())
        assert commands.wait(pid, 0.2) is None
    assert commands.wait(pid) == 0
    assert content(tmp_path) == whole


def test_ctrl_c_ends_soon_and_keeps_what_is_finished(job, commands, whole, tmp_path):
    for wanted in (1, 9, 17):
        pid, output = commands.start("collect", job, "-o", tmp_path)
        wait_for(lambda wanted=wanted: len(segments(tmp_path)) >= wanted)
        started = time.monotonic()
        os.kill(pid, signal.SIGINT)
        status = commands.wait(pid)
        assert time.monotonic() - started < 5
        assert status not in (0, 70), output.read_text()
        assert "Traceback" not in output.read_text()
        assert f"stopped: {len(segments(tmp_path))} of {SEGMENTS} segments" in " ".join(output.read_text().split())
        assert not list(tmp_path.rglob("*.tmp"))
    status, output = commands.run("collect", job, "-o", tmp_path)
    assert status == 0, output
    assert content(tmp_path) == whole


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True,
                             text=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_it_and_space_lets_it_go_on(job, commands, whole, small_disk):
    out, ballast = small_disk / "out", small_disk / "ballast"
    pid, output = commands.start("collect", job, "-o", out)
    wait_for(lambda: len(segments(out)) >= 3)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    assert commands.wait(pid) == 1
    message = output.read_text()[output.read_text().index("error: "):]
    assert "no space left on the disk" in message
    assert message.count("\n") == 1
    assert "Traceback" not in output.read_text()
    assert 3 <= len(segments(out)) < SEGMENTS
    status, output = commands.run("collect", job, "-o", out)
    assert status == 1
    assert "more, but the disk has" in output
    ballast.unlink()
    status, output = commands.run("collect", job, "-o", out)
    assert status == 0, output
    assert content(out) == whole


def test_kills_while_a_store_grows(job, commands, tmp_path):
    """Sites, training tokens and held-out tokens are added; ten kills, the first five as soon as something changes."""
    more = ("--set", "activations.layers=[0, 1, 2]", "--set", "tokens.count=10000", "--set", "tokens.held_out=1000")
    begun, whole, killed = (tmp_path / name for name in ("begun", "whole", "killed"))
    assert commands.run("collect", job, "-o", begun)[0] == 0
    shutil.copytree(begun, whole)
    shutil.copytree(begun, killed)
    status, output = commands.run("collect", job, *more, "-o", whole)
    assert status == 0, output
    random = np.random.default_rng(0)
    for kill in range(10):
        before = content_names(killed)
        pid, output = commands.start("collect", job, *more, "-o", killed)
        wait_for(lambda before=before: content_names(killed) != before)
        status = commands.wait(pid, random.uniform(0, 0.02 if kill < 5 else 0.3))
        assert status is None, f"it ended before it was killed ({kill} kills): {output.read_text()}"
        os.kill(pid, signal.SIGKILL)
        assert commands.wait(pid) == -signal.SIGKILL
    status, output = commands.run("collect", job, *more, "-o", killed)
    assert status == 0, output
    assert content(killed) == content(whole)
    assert commands.run("store", "verify", killed)[0] == 0
    assert (content(whole).items() >= {name: digest for name, digest in content(begun).items()
                                       if "/layer_" in name and f"segment-{SEGMENTS - 1:06}" not in name
                                       and "held_out" not in name}.items())


def content_names(out):
    """Like `content`, for a folder in which a process is working."""
    return {str(path.relative_to(out)) for path in files_below(out) if not path.name.startswith(".lock")}
