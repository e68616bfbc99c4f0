"""The cache of answers loses nothing, one run at a time claims a question, and a damaged file is refused."""

import multiprocessing
import sqlite3

import pytest

from olmoscope.errors import UserError
from olmoscope.labelling.cache import AnswerCache, canonical, key_of


def test_the_first_answer_stays(tmp_path):
    question = canonical({"b": 1, "a": "ü"})
    assert question == '{"a":"\\u00fc","b":1}' == canonical({"a": "ü", "b": 1})
    with AnswerCache(tmp_path / "a" / "answers.sqlite") as cache:
        assert cache.get(key_of(question)) is None
        cache.put(question, "one")
        cache.put(question, "two")
    with AnswerCache(tmp_path / "a" / "answers.sqlite") as cache:
        assert cache.get(key_of(question)) == "one"


def _try_claim(path, key, found):
    with AnswerCache(path) as cache:
        found.put(cache.claim(key))


def test_a_claim_is_for_one_process_and_ends_with_it(tmp_path):
    context = multiprocessing.get_context("fork")
    path, key, found = tmp_path / "answers.sqlite", key_of("q"), context.Queue()

    def other(key):
        process = context.Process(target=_try_claim, args=(path, key, found))
        process.start()
        process.join()
        return found.get(timeout=10)

    with AnswerCache(path) as cache:
        assert other(key) and cache.claim(key)  # the other process has ended, which releases its claim
        assert not other(key) and other(key_of("another"))
        cache.release(key)
        assert other(key)


def test_files_that_are_no_cache(tmp_path):
    (tmp_path / "text").write_text("not a database " * 100)
    with pytest.raises(UserError, match="is damaged or not a cache"):
        AnswerCache(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE things (a)")
    with pytest.raises(UserError, match="not a cache of answers"):
        AnswerCache(tmp_path / "other")
    with pytest.raises(UserError, match="cannot open"):
        AnswerCache(tmp_path / "text" / "below")


def test_a_row_that_was_changed_is_found(tmp_path):
    with AnswerCache(tmp_path / "c") as cache:
        cache.put("question", "answer")
    with sqlite3.connect(tmp_path / "c") as connection:
        connection.execute("UPDATE answers SET question = 'another'")
    with AnswerCache(tmp_path / "c") as cache, pytest.raises(UserError, match="damaged"):
        cache.get(key_of("question"))
