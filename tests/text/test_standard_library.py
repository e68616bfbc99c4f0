"""The embedded corpus: what is in it, and that it is written once, completely, the same each time."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from olmoscope.errors import UserError
from olmoscope.text import standard_library
from olmoscope.text.split import is_held_out
from olmoscope.text.standard_library import Chat, modules, questions, write_corpus


@pytest.fixture(scope="module")
def chats() -> list[Chat]:
    return list(questions())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    assert write_corpus(folder)
    return folder


def test_modules_are_the_sources_of_the_library_and_not_its_tests():
    documents = list(modules())
    by_id = {document.id: document for document in documents}
    assert len(by_id) == len(documents) > 300
    assert by_id["json/decoder.py"].text == Path(json.decoder.__file__).read_text()
    assert [document.id for document in documents] == sorted(by_id)
    folders = {part for name in by_id for part in Path(name).parts[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})
    assert all(document.source == "modules" and document.text.strip() for document in documents)


def test_questions_are_answered_by_docstrings_and_topics(chats: list[Chat]):
    messages = {chat.id: chat.messages for chat in chats}
    question, answer = messages["json/__init__.py#dumps"]
    assert question == {"role": "user", "content": "What does `json.dumps` do?"}
    assert answer["role"] == "assistant"
    assert answer["content"].startswith("json.dumps(obj, *, skipkeys=False")
    assert "Serialize ``obj`` to a JSON formatted ``str``." in answer["content"]
    assert messages["json/decoder.py#JSONDecoder"][0]["content"] == "What is `json.decoder.JSONDecoder`?"
    assert "json/decoder.py#JSONDecoder.raw_decode" in messages
    assert "assert" in messages["topics/assert"][1]["content"]


def test_ids_of_questions_are_unique_and_follow_their_module_in_the_split(chats: list[Chat]):
    ids = [chat.id for chat in chats]
    assert len(set(ids)) == len(ids) > 3000
    known = {document.id for document in modules()}
    for chat_id in ids:
        family = chat_id.split("#")[0]
        assert family in known or family.startswith("topics/")
        assert is_held_out(chat_id, 0.05) == is_held_out(family, 0.05)


def test_no_module_is_imported(chats: list[Chat]):
    assert any(chat.id == "antigravity.py#geohash" for chat in chats)
    assert "antigravity" not in sys.modules  # it would have opened a browser
    assert "turtledemo.clock" not in sys.modules


def test_the_files_are_dolma_shards_and_chat_shards(corpus: Path, chats: list[Chat]):
    rows = []
    shards = sorted((corpus / "dolma").glob("*.json.gz"))
    assert len(shards) > 1
    for shard in shards:
        with gzip.open(shard, "rt") as file:
            rows += [json.loads(line) for line in file]
    assert {row["id"]: row["text"] for row in rows} == {document.id: document.text for document in modules()}
    assert set(rows[0]) == {"id", "text", "source", "added", "created", "metadata"}
    assert [row["id"] for row in rows] != sorted(row["id"] for row in rows)

    shards = sorted((corpus / "chat").glob("*.parquet"))
    assert [shard.name for shard in shards] == [f"train-{n:05d}-of-{len(shards):05d}.parquet"
                                                for n in range(len(shards))]
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert set(rows[0]) == {"id", "messages", "source"}
    assert {row["id"]: row["messages"] for row in rows} == {chat.id: chat.messages for chat in chats}


def test_writing_again_does_nothing(corpus: Path):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*") if path.is_file()}
    assert not write_corpus(corpus)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*") if path.is_file()} == before


def test_damaged_and_missing_files_are_written_again_with_the_same_bytes(corpus: Path):
    before = {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()}
    (corpus / "dolma" / "000.json.gz").write_bytes(b"half")
    next((corpus / "chat").glob("*.parquet")).unlink()
    assert write_corpus(corpus)
    assert {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()} == before


def test_a_corpus_of_another_python_is_refused(tmp_path: Path):
    (tmp_path / "corpus.json").write_text(json.dumps({"version": 1, "python": "3.2.1", "files": {}}))
    with pytest.raises(UserError, match=r"another Python.*corpus\.json"):
        write_corpus(tmp_path)


def test_a_library_without_sources_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken.py").write_bytes(b"# coding: utf-8\n\xff\n")
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="no Python sources"):
        list(modules())


def test_odd_sources_give_documents_but_no_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "python2.py").write_text("print 'old'\n")
    (tmp_path / "surrogate.py").write_text('def half():\n    "\\ud800 alone"\n')
    (tmp_path / "twice.py").write_text('try:\n    def f(): "one"\nexcept ImportError:\n    def f(): "two"\n')
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [document.id for document in modules()] == ["python2.py", "surrogate.py", "twice.py"]
    answers = {chat.id: chat.messages[1]["content"] for chat in questions() if not chat.id.startswith("topics/")}
    assert answers == {"surrogate.py#half": "surrogate.half()\n\n? alone", "twice.py#f": "twice.f()\n\none"}
