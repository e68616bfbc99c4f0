"""Chats: rendering, and parquet shards read from any row on."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from olmoscope.errors import UserError
from olmoscope.text import chat
from olmoscope.text.row import Malformed, Row

TALK = [{"role": "user", "content": "What is a latent?"}, {"role": "assistant", "content": "A direction.\nIt fires."}]


def _talk(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]


def _write(path: Path, columns: dict[str, Any], row_group: int = 1000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


def _rows(path: Path, start: int = 0) -> list[Row | Malformed]:
    return list(chat.read(path, path.name, start, "plain"))


def test_plain() -> None:
    assert chat.render(TALK, "plain") == "user: What is a latent?\n\nassistant: A direction.\nIt fires."


def test_chatml() -> None:
    assert chat.render(TALK, "chatml") == ("<|im_start|>user\nWhat is a latent?<|im_end|>\n"
                                           "<|im_start|>assistant\nA direction.\nIt fires.<|im_end|>\n")


@pytest.mark.parametrize("row_group", [1, 7, 130, 400])
def test_reads_from_any_row(tmp_path: Path, row_group: int) -> None:
    columns = {"id": [f"chat-{i}" for i in range(300)], "messages": [_talk(i) for i in range(300)], "n": [1] * 300}
    path = _write(tmp_path / "chats.parquet", columns, row_group)
    expected = [Row(f"chat-{i}", f"user: question {i}\n\nassistant: answer {i}") for i in range(300)]
    assert _rows(path) == expected
    for start in (1, 6, 7, 8, 129, 131, 299, 300, 301):
        assert _rows(path, start) == expected[start:]


def test_ids_without_a_column_are_file_and_row(tmp_path: Path) -> None:
    path = _write(tmp_path / "chats.parquet", {"messages": [_talk(i) for i in range(200)]}, 64)
    ids = [row.id for row in _rows(path, 150) if isinstance(row, Row)]
    assert ids == [f"chats.parquet:{number}" for number in range(151, 201)]


def test_null_content_is_an_empty_message_and_silence_an_empty_text(tmp_path: Path) -> None:
    call = [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": None}]
    silent = [{"role": "user", "content": " \n"}, {"role": "assistant", "content": None}]
    path = _write(tmp_path / "chats.parquet", {"messages": [call, silent, []]})
    assert [row.text for row in _rows(path) if isinstance(row, Row)] == ["user: weather?\n\nassistant: ", "", ""]


def test_malformed_rows(tmp_path: Path) -> None:
    nobody = [{"role": None, "content": "who says this?"}]
    path = _write(tmp_path / "chats.parquet", {"messages": [_talk(0), None, nobody, _talk(3)]})
    rows = _rows(path)
    assert [isinstance(row, Malformed) for row in rows] == [False, True, True, False]
    assert rows[1] == Malformed("messages is missing")
    assert rows[2] == Malformed("message 0 lacks a text as its role")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xff"])
    contents = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    messages = pa.ListArray.from_arrays([0, 1, 2], pa.StructArray.from_arrays(
        [pa.array(["user", "user"]), contents], ["role", "content"]))
    rows = _rows(_write(tmp_path / "chats.parquet", {"messages": messages}))
    assert rows[0] == Row("chats.parquet:1", "user: fine")
    assert isinstance(rows[1], Malformed)
    assert rows[1].reason.startswith("not UTF-8")


def test_messages_of_another_shape(tmp_path: Path) -> None:
    assert _rows(_write(tmp_path / "a.parquet", {"messages": ["a text"]})) == [Malformed("messages is not a list")]
    assert _rows(_write(tmp_path / "b.parquet", {"messages": [["a"]]})) == [Malformed("message 0 is not a mapping")]
    keyless = [[{"role": "user", "text": "a"}]]
    assert _rows(_write(tmp_path / "c.parquet", {"messages": keyless})) == [
        Malformed("message 0 lacks a text as its content")]


def test_other_columns_are_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "texts.parquet", {"text": ["a"], "url": ["b"]})
    with pytest.raises(UserError, match=r"texts\.parquet has no column `messages` \(it has text, url\)"):
        _rows(path)


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    path = _write(tmp_path / "chats.parquet", {"messages": [_talk(i) for i in range(50)]})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"chats\.parquet cannot be read as parquet"):
        _rows(path)
    with pytest.raises(UserError, match=r"gone\.parquet is missing"):
        _rows(tmp_path / "gone.parquet")
