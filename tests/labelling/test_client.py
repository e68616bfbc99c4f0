"""The client against an endpoint that behaves, and one that does not."""

import json
import logging
import threading
import time

import pytest
from pydantic import BaseModel, Field

from chat_endpoint import OVERHEAD, ChatEndpoint, Trouble, count
from olmoscope.errors import UserError
from olmoscope.labelling import client as client_module
from olmoscope.labelling.budget import Budget, BudgetSpentError
from olmoscope.labelling.cache import AnswerCache
from olmoscope.labelling.client import ChatClient, Limits
from olmoscope.labelling.endpoint import Answer, Failure, Question, endpoint_of


class Percent(BaseModel):
    percent: float = Field(ge=0, le=100, strict=True)


def question(text, longest=30):
    return Question(f"How likely is {text}?", Percent, longest)


@pytest.fixture
def server():
    with ChatEndpoint(lambda prompt: json.dumps({"percent": len(prompt) % 100})) as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        yield cache


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(client_module, "LONGEST_WAIT", 0.02)


def opened(server, cache, budget=None, limits=None, form=None, key=None):
    environment = {} if key is None else {"OPENAI_API_KEY": key}
    return ChatClient(endpoint_of(server.url, "a-model", environment), cache, budget or Budget(),
                      limits or Limits(timeout=5), form)


def reasons(answers):
    return [answer.reason if isinstance(answer, Failure) else None for answer in answers]


def test_answers_come_in_the_order_of_the_questions_and_never_too_many_at_once(server, cache):
    server.seconds = 0.02
    questions = [question("x" * number) for number in range(20)]
    with opened(server, cache, limits=Limits(concurrency=3)) as client:
        answers = client.ask(questions)
    assert [answer.value.percent for answer in answers] == [len(one.prompt) % 100 for one in questions]
    assert 1 < server.most_at_once <= 3
    body = server.asked[0]
    assert body["model"] == "a-model" and body["max_tokens"] == 30 and body["temperature"] == 0
    assert body["response_format"]["json_schema"]["schema"] == {
        "type": "object", "properties": {"percent": {"type": "number"}}, "required": ["percent"],
        "additionalProperties": False}


def test_nothing_is_asked_twice(server, cache):
    questions = [question(str(number)) for number in range(5)]
    with opened(server, cache) as client:
        first = client.ask([*questions, *questions])
        assert (client.asked, client.cached, len(server.asked)) == (5, 5, 5)
    with opened(server, cache) as client:
        assert client.ask(questions) == first[:5] == first[5:]
        assert (client.asked, client.cached, len(server.asked)) == (0, 5, 5)
        assert client.budget.used.total == 0
    with opened(server, cache) as client:  # a question that differs in any part is another question
        client.ask([question("0", longest=31)])
        assert client.asked == 1


def test_tokens_are_those_that_the_answers_report(server, cache):
    with opened(server, cache) as client:
        client.ask([question(str(number)) for number in range(7)])
        assert client.budget.used.prompt == server.prompt_tokens == sum(
            count(prompt) + OVERHEAD for prompt in server.prompts())
        assert client.budget.used.completion == server.completion_tokens
        assert client.budget.unreported == 0


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": -5, "completion_tokens": 1}, "many"])
def test_where_no_usage_is_reported_the_estimate_counts_and_is_told_apart(server, cache, usage):
    server.troubles.append(Trouble(changes={"usage": usage}))
    with opened(server, cache) as client:
        client.ask([question("this")])
        assert client.budget.unreported == 1
        assert client.budget.used == client.budget.estimate(question("this").prompt, 30)


@pytest.mark.parametrize("trouble", [
    Trouble(status=503, times=2), Trouble(status=429, times=2), Trouble(status=500, body=b"<html>", times=1),
    Trouble(status=429, headers={"Retry-After": "0.05"}, times=12), Trouble(cut=40, times=2), Trouble(cut=0, times=2),
    Trouble(body=b"<html>login</html>", times=1), Trouble(body=b"", times=1), Trouble(body=b'{"choices": []}', times=1),
    Trouble(body=b" " * 2_100_000, times=1), Trouble(seconds=0.6, times=1)],
    ids=["503", "429", "500", "retry-after", "cut", "cut at once", "a proxy's page", "nothing", "no choice", "endless",
         "silence"])
def test_what_can_pass_is_asked_again(server, cache, trouble):
    server.troubles.append(trouble)
    trials = trouble.times
    with opened(server, cache, limits=Limits(timeout=0.3)) as client:
        answer, = client.ask([question("this")])
        assert isinstance(answer, Answer)
        assert client.retries.total() == trials and not client.failures
        assert client.budget.used.prompt == count(question("this").prompt) + OVERHEAD


def test_a_server_may_name_a_date(server, cache):
    server.troubles.append(Trouble(status=429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, times=1))
    server.troubles.append(Trouble(status=429, headers={"Retry-After": "when it suits"}, times=1))
    with opened(server, cache) as client:
        assert isinstance(client.ask([question("this")])[0], Answer)


def test_a_wait_that_a_server_names_is_for_all(server, cache):
    server.per_second = 25
    with opened(server, cache, limits=Limits(concurrency=6)) as client:
        started = time.monotonic()
        answers = client.ask([question(str(number)) for number in range(12)])
        assert not any(reasons(answers)) and time.monotonic() - started >= 11 / 25
        assert set(client.retries) == {"status 429"}


def test_a_rate_of_our_own(server, cache):
    with opened(server, cache, limits=Limits(concurrency=6, per_minute=1500)) as client:
        started = time.monotonic()
        client.ask([question(str(number)) for number in range(8)])
        assert time.monotonic() - started >= 7 * 60 / 1500
        assert server.requests == 8


def test_what_does_not_pass_is_a_failure_that_the_next_run_asks_again(server, cache):
    server.troubles.append(Trouble(status=503, contains="bad"))
    with opened(server, cache) as client:
        answers = client.ask([question("good"), question("bad")])
        assert reasons(answers) == [None, "no answer: status 503"] and client.failures.total() == 1
        assert server.requests == 1 + client_module.ATTEMPTS
    server.troubles.clear()
    with opened(server, cache) as client:
        assert reasons(client.ask([question("good"), question("bad")])) == [None, None]
        assert (client.asked, client.cached) == (1, 1)


def test_an_endpoint_that_is_gone_ends_the_run(server, cache):
    server.troubles.append(Trouble(status=502))
    with (opened(server, cache) as client,
          pytest.raises(UserError, match=r"has not answered \d+ questions in a row.*status 502.*same command again")):
        client.ask([question(str(number)) for number in range(40)])


def test_nobody_listens(cache):
    endpoint = endpoint_of("http://127.0.0.1:9/v1", "m", {})
    with (ChatClient(endpoint, cache, Budget(), Limits(timeout=1)) as client,
          pytest.raises(UserError, match="the connection failed")):
        client.ask([question(str(number)) for number in range(12)])


@pytest.mark.parametrize(("trouble", "message"), [
    (Trouble(status=401, body=b'{"error": {"message": "no key"}}'), r"status 401: no key.*OPENAI_API_KEY"),
    (Trouble(status=404, body=b'{"detail": "no model"}'), r"status 404: no model.*the model's name, a-model"),
    (Trouble(status=400, body=b'{"error": "bad"}'), r"status 400: bad.*takes chat completions"),
    (Trouble(status=302, headers={"Location": "http://elsewhere/"}), r"status 302.*final address"),
    (Trouble(status=429, body=b'{"error": {"message": "pay", "code": "insufficient_quota"}}'), r"429: pay.*no quota")])
def test_what_cannot_pass_ends_the_run_with_one_line_after_one_request(server, cache, trouble, message):
    server.troubles.append(trouble)
    with (opened(server, cache, limits=Limits(concurrency=1)) as client,
          pytest.raises(UserError, match=message) as error):
        client.ask([question("this"), question("that"), question("more")])
    assert "\n" not in str(error.value) and server.requests == 1


def test_one_question_that_the_server_does_not_like_does_not_end_the_run(server, cache):
    server.troubles.append(Trouble(status=400, body=b'{"error": {"message": "filtered"}}', contains="wicked"))
    with opened(server, cache) as client:
        client.ask([question("good")])
        assert reasons(client.ask([question("wicked"), question("better")])) == [
            "the endpoint refused the question (status 400)", None]


@pytest.mark.parametrize(("changes", "reason"), [
    ({"content": '{"percent": 140}'}, "percent: less_than_equal"), ({"content": '{"percent": "70"}'}, "float_type"),
    ({"content": '{"percent": true}'}, "float_type"), ({"content": '{"percent": NaN}'}, "no JSON object"),
    ({"content": '{"percent": 1e999}'}, "percent: less_than_equal"), ({"content": '{"chance": 3}'}, "percent: missing"),
    ({"content": "I think 70"}, "no JSON object"), ({"content": ""}, "empty"), ({"content": None}, "empty"),
    ({"content": "[1, 2]"}, "no JSON object"), ({"content": '{"percent": 12'}, "no JSON object"),
    ({"content": '{"a":' * 3000}, "no JSON object"), ({"content": "x" * 60_000}, "far too long"),
    ({"content": '{"percent": 1', "finish_reason": "length"}, "cut off"), ({"refusal": "I will not"}, "refused"),
    ({"finish_reason": "content_filter"}, "refused")])
def test_a_wrong_answer_is_a_failure_with_its_reason_and_is_not_asked_again(server, cache, changes, reason):
    server.troubles.append(Trouble(changes=changes))
    for _ in range(2):
        with opened(server, cache) as client:
            answer, = client.ask([question("this")])
            assert isinstance(answer, Failure) and reason in answer.reason
            assert client.failures == {answer.reason: 1}
    assert server.requests == 1


@pytest.mark.parametrize("content", ['```json\n{"percent": 70}\n```', '<think>{"percent": 1}</think>{"percent": 70.0}',
                                     'Sure! {"percent": 70, "why": "{"}'])
def test_json_may_stand_among_words(server, cache, content):
    server.troubles.append(Trouble(changes={"content": content}))
    with opened(server, cache) as client:
        assert client.ask([question("this")])[0].value.percent == 70


def test_a_server_without_json_schemas_is_asked_in_another_way_and_that_is_said(server, cache, caplog):
    server.refuses = ("json_schema",)
    with opened(server, cache) as client:
        assert reasons(client.ask([question(str(number)) for number in range(6)])) == [None] * 6
        assert "any JSON object, as --answers object does" in caplog.text and caplog.text.count("from now on") == 1
    server.refuses = ("response_format", "max_tokens", "temperature")
    caplog.clear()
    with opened(server, cache) as client:
        assert reasons(client.ask([question("new")])) == [None]
        assert caplog.text.count("from now on") == 4
        assert "response_format" not in server.asked[-1] and server.asked[-1]["max_completion_tokens"] == 30


def test_the_way_of_asking_that_a_user_chose_is_not_changed(server, cache):
    server.refuses = ("json_schema",)
    with opened(server, cache, form="schema") as client, pytest.raises(UserError, match="Unsupported parameter"):
        client.ask([question("this")])
    server.refuses = ("response_format",)
    with opened(server, cache, form="text") as client:
        assert reasons(client.ask([question("this")])) == [None]


def test_the_key_goes_to_the_server_and_nowhere_else(server, cache, caplog, tmp_path):
    server.key = "sk-very-secret"
    server.answer = lambda prompt: '{"percent": 5, "you said": "sk-very-secret"}'
    with caplog.at_level(logging.DEBUG):
        with opened(server, cache, key="sk-very-secret") as client:
            assert reasons(client.ask([question("this")])) == [None]
        with opened(server, cache, key="sk-wrong-secret") as client, pytest.raises(UserError) as error:
            client.ask([question("that")])
    assert "(the key)" in str(error.value) and "wrong-secret" not in str(error.value)
    assert "secret" not in caplog.text
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(("url", "message"), [
    ("localhost:8000", "not the address"), ("ftp://host/v1", "not the address"), ("http://", "not the address"),
    ("http://host:port/v1", "not the address"), ("https://me:pw@host/v1", "OPENAI_API_KEY"),
    ("https://host/v1?key=1", "OPENAI_API_KEY")])
def test_an_address_that_is_none(url, message):
    with pytest.raises(UserError, match=message) as error:
        endpoint_of(url, "m", {})
    assert "pw" not in str(error.value)


def test_addresses():
    assert endpoint_of("http://h:1/v1/chat/completions", "m", {}).chat == "http://h:1/v1/chat/completions"
    assert endpoint_of("http://h:1/v1/", "m", {}).chat == "http://h:1/v1/chat/completions"
    assert endpoint_of("http://h/v1", "m", {"OPENAI_API_KEY": "k"}).sends_key_in_clear
    assert not endpoint_of("http://127.0.0.1/v1", "m", {"OPENAI_API_KEY": "k"}).sends_key_in_clear
    assert not endpoint_of("https://h/v1", "m", {"OPENAI_API_KEY": "k"}).sends_key_in_clear


def test_a_budget_stops_before_it_is_exceeded_and_keeps_what_was_answered(server, cache):
    questions = [question("some words " * 20 + str(number)) for number in range(60)]
    budget = Budget(3000)
    with opened(server, cache, budget) as client, pytest.raises(BudgetSpentError):
        client.ask(questions)
    spent = server.prompt_tokens + server.completion_tokens
    assert budget.used.total == spent <= 3000 and len(server.asked) == client.asked > 5
    with opened(server, cache) as client:
        assert not any(reasons(client.ask(questions)))
    assert len(set(server.prompts())) == len(server.asked) == 60


def test_closing_drops_what_is_in_flight_at_once(server, cache):
    from concurrent.futures import CancelledError

    server.seconds = 3
    client = opened(server, cache)
    caught = []

    def work():
        try:
            client.ask([question("this")])
        except CancelledError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    started = time.monotonic()
    client.close()
    thread.join()
    assert caught and time.monotonic() - started < 2
    client.close()
