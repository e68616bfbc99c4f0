"""Chats: rendering, and parquet shards read from any row on."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from olmoscope.errors import UserError
from olmoscope.text import chat
from olmoscope.text.messages import messages_of
from olmoscope.text.row import Malformed, Row
from olmoscope.text.table import read_chats

TALK = [{"role": "user", "content": "What is a latent?"}, {"role": "assistant", "content": "A direction.\nIt fires."}]


def _talk(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]


def _write(path: Path, columns: dict[str, Any], row_group: int = 1000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


def _rows(path: Path, start: int = 0) -> list[Row | Malformed]:
    return list(read_chats(path, path.name, start, None, chat.hand_rendered("plain")))


def _render(messages: object, format: Any) -> tuple[str, tuple[str, ...]]:
    row = chat.row_of_chat(messages, "id", "id", chat.hand_rendered(format))
    assert isinstance(row, Row), row
    return row.text, row.lost


def test_plain() -> None:
    assert _render(TALK, "plain")[0] == "user: What is a latent?\n\nassistant: A direction.\nIt fires."


def test_chatml() -> None:
    assert _render(TALK, "chatml")[0] == ("<|im_start|>user\nWhat is a latent?<|im_end|>\n"
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
    assert _rows(_write(tmp_path / "a.parquet", {"messages": ["a text"]})) == [
        Malformed("messages is a text, and not JSON")]
    assert _rows(_write(tmp_path / "b.parquet", {"messages": [["a"]]})) == [Malformed("message 0 is not a mapping")]
    keyless = [[{"role": "user", "text": "a"}]]
    assert _rows(_write(tmp_path / "c.parquet", {"messages": keyless})) == [
        Malformed("message 0 lacks a text as its content")]


def test_other_columns_are_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "texts.parquet", {"text": ["a"], "url": ["b"]})
    with pytest.raises(UserError, match=r"texts\.parquet has no column messages or conversations or conversation \(it"):
        _rows(path)


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    path = _write(tmp_path / "chats.parquet", {"messages": [_talk(i) for i in range(50)]})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"chats\.parquet cannot be read as parquet"):
        _rows(path)
    with pytest.raises(UserError, match=r"gone\.parquet is missing"):
        _rows(tmp_path / "gone.parquet")


CALL = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize("message", [
    {"content": None, "tool_calls": [CALL]},
    {"content": None, "tool_calls": [{"name": "get_weather", "arguments": {"city": "Oslo", "unit": None}}]},
    {"tool_calls": '[{"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}]', "content": ""},
    {"content": None, "function_call": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}},
    {"content": [{"type": "tool_use", "id": "x", "name": "get_weather", "input": {"city": "Oslo"}}]},
])
def test_tool_calls_are_rendered(message: dict[str, Any]) -> None:
    assert _render([{"role": "assistant", **message}], "plain") == (f"assistant: {CALLED}", ())
    both = [{"role": "assistant", "content": "I look.", **{k: v for k, v in message.items() if k != "content"}}]
    if "content" not in message or not isinstance(message["content"], list):
        assert _render(both, "chatml") == (f"<|im_start|>assistant\nI look.\n{CALLED}<|im_end|>\n", ())


def test_function_calls_that_are_no_json_stay_as_they_are() -> None:
    said = _render([{"role": "assistant", "content": "", "function_calls": "get_weather(city=Oslo)"}], "plain")
    assert said == ("assistant: <tool_call>\nget_weather(city=Oslo)\n</tool_call>", ())


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stands_before_the_content(key: str) -> None:
    talk = [{"role": "assistant", "content": "Yes.", key: "zebra thinks"}]
    assert _render(talk, "chatml")[0] == ("<|im_start|>assistant\n<think>\nzebra thinks\n</think>\n\nYes.<|im_end|>\n")
    parts = [{"role": "assistant", "content": [{"type": "thinking", "thinking": "zebra thinks"},
                                               {"type": "text", "text": "Yes."}]}]
    assert _render(parts, "chatml") == _render(talk, "chatml")
    told = [{"role": "assistant", "content": "<think>zebra thinks</think>Yes.", key: "zebra thinks"}]
    assert _render(told, "plain")[0] == "assistant: <think>zebra thinks</think>Yes."


def test_content_as_parts_and_what_is_no_text_is_named() -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "image", "image": "x.png"},
                                         {"type": "image_url", "image_url": {"url": "y"}}, "this?"]},
            {"role": "tool", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "A cat."}]}]},
            {"role": "assistant", "content": {"type": "text", "text": "A cat."}, "refusal": "no", "id": "7"}]
    assert _render(talk, "plain") == ("user: What is\nthis?\n\ntool: A cat.\n\nassistant: A cat.",
                                      ("image", "image_url", "refusal"))
    silent = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    assert _render(silent, "plain") == ("", ("image",))


def test_share_gpt_and_json() -> None:
    talk = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hi"}]
    wanted = "system: Be kind.\n\nuser: Hello\n\nassistant: Hi"
    filled = [{"role": None, "content": None, **message} for message in talk]  # parquet adds the keys of other rows
    for given in (talk, filled, json.dumps(talk), {"conversations": talk}, json.dumps({"messages": talk})):
        assert _render(given, "plain") == (wanted, ())
    call = [{"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "rain"}]
    assert _render(call, "plain")[0] == f"assistant: {CALLED}\n\ntool: rain"
    assert messages_of("not JSON") == Malformed("messages is a text, and not JSON")


def test_json_lines_of_chats(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    lines = [{"messages": _talk(0), "id": "a"}, {"conversations": [{"from": "human", "value": "Hello"}]}, {"x": 1}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert _rows(path) == [Row("a", "user: question 0\n\nassistant: answer 0"), Row("chats.jsonl:2", "user: Hello"),
                           Malformed("no key messages or conversations or conversation (it has x)"),
                           Row("chats.jsonl:4", "")]
    assert _rows(path, 1) == _rows(path)[1:]


@pytest.mark.parametrize(("message", "text", "lost"), [
    ({"role": "user", "content": ["one", None, {"type": "text", "text": "two"}, 3]}, "user: one\ntwo",
     ("part of type int",)),
    ({"role": "user", "content": {"type": "text", "text": "alone"}}, "user: alone", ()),
    ({"role": "user", "content": [{"text": "seen"}, {"type": "image_url"}]}, "user: seen", ("image_url",)),
    ({"role": "user", "content": [{"text": "seen"}, {"url": "x"}]}, "user: seen", ("part without a text",)),
    ({"from": "human", "value": "by its other names"}, "user: by its other names", ()),
    ({"role": "assistant", "content": "said", "reasoning_content": ["not a text"]}, "assistant: said",
     ("reasoning_content",))])
def test_parts_that_are_no_text_are_left_out_and_named(message: Any, text: str, lost: tuple[str, ...]) -> None:
    assert _render([message], "plain") == (text, lost)


@pytest.mark.parametrize(("given", "names"), [
    ('[{"name": "search", "arguments": "{\\"q\\": 1}"}]', ["search"]),
    ("  ", []), ({}, []), ("no JSON", [""]),
    ([{"function": {"name": "a"}}, {"function": {"arguments": "b"}}], ["a", ""])])
def test_calls_in_every_form(given: Any, names: list[str]) -> None:
    found = messages_of([{"role": "assistant", "content": "x", "tool_calls": given}])
    assert isinstance(found, list)
    assert [call.name for call in found[0].calls] == names
    if names == ["search"]:
        assert found[0].calls[0].arguments == {"q": 1}


@pytest.mark.parametrize(("value", "why"), [
    ("{", "messages is a text, and not JSON"), ("[" * 100_000, "messages is a text, and not JSON"),
    (None, "messages is missing"), (3, "messages is not a list"), (["hi"], "message 0 is not a mapping"),
    ([{"content": "x"}], "message 0 lacks a text as its role"),
    ([{"role": "user"}], "message 0 lacks a text as its content"),
    ([{"role": "user", "content": 3}], "message 0 lacks a text as its content")])
def test_what_is_no_chat_is_said(value: Any, why: str) -> None:
    assert messages_of(value) == Malformed(why)
