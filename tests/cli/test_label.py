"""`olmoscope label` gives labels with scores, does nothing the second time, and reports bad input in one line."""

import json
from pathlib import Path

import pytest

from commands import run_forked
from feature_index import small_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_index(tmp_path_factory.mktemp("label"))


def test_features_are_labelled_once(index: Path, tmp_path: Path) -> None:
    first = run_forked("label", index, "--most", 12)
    assert first.returncode == 0, first.stderr
    assert "of 12 features have a label" in " ".join(first.stdout.split())
    again = run_forked("label", index, "--most", 12)
    assert again.returncode == 0 and "12 features are labelled already, nothing to do" in " ".join(again.stdout.split())
    more = run_forked("label", index, "--most", 14)
    assert "labelled already, nothing to do" not in " ".join(more.stdout.split())
    assert run_forked("label", index, "--export", tmp_path / "labels.jsonl").returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert lines and all(one["labeller"] == "rules 2" and one["label"] for one in lines)
    assert not any(one["scores"]["clamped_tokens"] for one in lines)
    clamped = run_forked("label", index, "--most", 14, "--clamp")
    assert clamped.returncode == 0, clamped.stderr
    assert run_forked("label", index, "--export", tmp_path / "clamped.jsonl").returncode == 0
    new = (tmp_path / "clamped.jsonl").read_text().splitlines()[len(lines):]
    assert new and all(json.loads(line)["scores"]["clamped_tokens"] for line in new)
    read = run_forked("label", index, "--import", tmp_path / "labels.jsonl")
    assert "0 new labels" in " ".join(read.stdout.split())


@pytest.mark.parametrize(("arguments", "said"), [
    (("--features", "7,x"), "'x' is not a feature"), (("--features", "512"), "there is no feature 512"),
    (("--features", "1", "--most", "2"), "give only one"),
    (("--import", "absent.jsonl"), "cannot read absent.jsonl")])
def test_bad_input_is_one_line(index: Path, arguments: tuple[str, ...], said: str) -> None:
    done = run_forked("label", index, *arguments)
    assert done.returncode == 1 and said in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
