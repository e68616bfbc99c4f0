"""Labels: history, search, export and import, many readers and writers at once, damaged files."""

import json
import sqlite3
import threading
from pathlib import Path

import pytest

from olmoscope.errors import UserError
from olmoscope.features.labels import LONGEST, Labels

HOSTILE = ["<img src=x onerror=alert(1)>", "a\0b", "‮desrever", "👩‍💻 emoji", '"; DROP TABLE entries; --', "x" * LONGEST,
           "AND OR NOT NEAR(", "'* ^ : -"]


def test_the_newest_entry_counts_and_the_others_stay(tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.sqlite", 10)
    labels.write(3, "numbers", "digits only")
    labels.write(3, "  years  ", "", author="anna", score=0.75)
    newest = labels.newest(3)
    assert newest is not None
    assert (newest.label, newest.note, newest.author, newest.score) == ("years", "", "anna", 0.75)
    assert [entry.label for entry in labels.history(3)] == ["years", "numbers"]
    assert labels.newest(4) is None
    labels.write(3, "", "")
    assert labels.search("years") == [] and len(labels.history(3)) == 3


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_kept_and_found_as_it_is(tmp_path: Path, text: str) -> None:
    labels = Labels(tmp_path / "labels.sqlite", 10)
    labels.write(5, f"plain {text}"[:LONGEST], text)
    labels.write(6, "another", "")
    assert labels.newest(5).note == text  # type: ignore[union-attr]
    assert labels.search("plai") == [5]
    assert isinstance(labels.search(text), list), "a search is words, never a query language"
    assert labels.search("") == labels.search('"') == []


def test_an_export_brings_everything_back(tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.sqlite", 10)
    for number, text in enumerate(HOSTILE):
        labels.write(number, text, "note\n" + text[:100], score=0.5)
    lines = list(labels.export())
    assert all(json.loads(line)["label"] for line in lines)
    other = Labels(tmp_path / "other.sqlite", 10)
    assert other.import_lines(lines) == len(HOSTILE)
    assert other.import_lines(lines) == 0, "what is there is passed over"
    assert list(other.export()) == lines


@pytest.mark.parametrize("line", ["no json", "[]", "{}", '{"feature": "1", "label": "x"}', '{"feature": 1, "label": 2}',
                                  '{"feature": 10, "label": "x"}', '{"feature": true, "label": "x"}',
                                  '{"feature": 1, "label": "x", "score": "high"}'])
def test_a_bad_line_adds_nothing(tmp_path: Path, line: str) -> None:
    labels = Labels(tmp_path / "labels.sqlite", 10)
    with pytest.raises(UserError):
        labels.import_lines(['{"feature": 1, "label": "good"}', line])
    assert list(labels.export()) == []


def test_what_is_refused(tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.sqlite", 10)
    for feature in (-1, 10):
        with pytest.raises(UserError, match="features 0 to 9"):
            labels.write(feature, "x", "")
    with pytest.raises(UserError, match="at most"):
        labels.write(0, "x" * (LONGEST + 1), "")
    with pytest.raises(UserError, match="10 latents, this one has 11"):
        Labels(tmp_path / "labels.sqlite", 11)
    (tmp_path / "damaged.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(UserError, match="is damaged or not a labels file"):
        Labels(tmp_path / "damaged.sqlite", 10)
    sqlite3.connect(tmp_path / "foreign.sqlite").execute("CREATE TABLE x (y)").connection.commit()
    with pytest.raises(UserError, match="not a"):
        Labels(tmp_path / "foreign.sqlite", 10)


@pytest.mark.slow
def test_fifty_readers_while_labels_are_written(tmp_path: Path) -> None:
    """No entry is lost, no call fails, and no reader ever sees half of a transaction."""
    labels = Labels(tmp_path / "labels.sqlite", 1000)
    done, problems = threading.Event(), []

    def read() -> None:
        try:
            last = 0
            while not done.is_set():
                entries = labels.since(0)
                assert len(entries) >= last and len(entries) % 2 == 0, "both of a pair or none"
                last = len(entries)
                assert len(labels.search("pair")) % 2 == 0
        except (AssertionError, sqlite3.Error) as error:
            problems.append(error)

    def write(begin: int) -> None:
        for number in range(begin, begin + 40, 2):
            labels.write_all([(one, f"pair {number}", "", "", None, "") for one in (number, number + 1)])

    readers = [threading.Thread(target=read) for _ in range(50)]
    writers = [threading.Thread(target=write, args=(begin,)) for begin in (0, 100, 200)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not problems
    assert {entry.feature for entry in labels.since(0)} == {*range(40), *range(100, 140), *range(200, 240)}
