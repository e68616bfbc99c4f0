"""Two runs at once ask nothing twice, and a killed run continues where it stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest

from chat_endpoint import ChatEndpoint
from olmoscope.labelling.cache import AnswerCache

RUN = """
import sys
from pathlib import Path
from pydantic import BaseModel
from olmoscope.labelling.budget import Budget
from olmoscope.labelling.cache import AnswerCache
from olmoscope.labelling.client import ChatClient, Limits
from olmoscope.labelling.endpoint import Question, endpoint_of

class Percent(BaseModel):
    percent: float

questions = [Question(f"question {number}", Percent, 10) for number in range(40)]
with AnswerCache(Path(sys.argv[2])) as cache, ChatClient(
        endpoint_of(sys.argv[1], "m", {}), cache, Budget(), Limits(concurrency=4)) as client:
    assert [answer.value.percent for answer in client.ask(questions)] == [1.0] * 40
    print(client.asked, client.cached)
"""


@pytest.fixture
def server():
    with ChatEndpoint(lambda prompt: '{"percent": 1}') as server:
        server.seconds = 0.03
        yield server


def start(server, cache):
    return subprocess.Popen([sys.executable, "-c", RUN, server.url, str(cache)], stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"NO_PROXY": "127.0.0.1"})


def test_two_runs_at_once_ask_nothing_twice(server, tmp_path):
    runs = [start(server, tmp_path / "answers") for _ in range(2)]
    counts = [tuple(map(int, run.communicate(timeout=60)[0].split())) for run in runs]
    assert len(server.prompts()) == len(set(server.prompts())) == 40
    assert sum(asked for asked, _ in counts) == 40 and all(sum(pair) == 40 for pair in counts)


@pytest.mark.slow
def test_a_killed_run_loses_no_more_than_what_was_in_flight(server, tmp_path):
    for moment in (3, 17, 30):
        run = start(server, tmp_path / "answers")
        while len(server.asked) < moment:
            time.sleep(0.005)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        with AnswerCache(tmp_path / "answers"):  # sound
            pass
    run = start(server, tmp_path / "answers")
    asked, cached = map(int, run.communicate(timeout=60)[0].split())
    assert asked + cached == 40 and cached >= 30 - 3 * 4
    assert len(set(server.prompts())) == 40 and len(server.prompts()) <= 40 + 3 * 4
