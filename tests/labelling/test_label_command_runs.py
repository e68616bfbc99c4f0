"""`olmoscope label --endpoint` as a command: kills, two at once, budgets, the key, mistakes."""

import os
import signal
import time

import pytest
from test_label_endpoint import honest

from chat_endpoint import ChatEndpoint
from commands import run_forked, shared_commands
from feature_index import small_index

pytestmark = pytest.mark.slow
FEATURES = 10


@pytest.fixture
def server():
    with ChatEndpoint(honest) as server:
        yield server


@pytest.fixture
def index(tmp_path):
    return small_index(tmp_path)


def command(index, server, *more):
    return ["label", index, "--endpoint", server.url, "--model", "a-model", "--most", FEATURES, *more]


def test_a_killed_command_goes_on_where_it_was_and_two_at_once_ask_nothing_twice(index, server):
    server.seconds = 0.01
    commands = shared_commands()
    pid, _ = commands.start(*command(index, server))
    while len(server.asked) < 25:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert commands.wait(pid) == -signal.SIGKILL
    pids = [commands.start(*command(index, server)) for _ in range(2)]
    for pid, output in pids:
        assert commands.wait(pid) == 0, output.read_text()
    assert len(server.prompts()) - len(set(server.prompts())) <= 8  # in flight when it was killed


def test_the_command(index, server, tmp_path):
    server.key = "sk-very-secret"
    environment = os.environ | {"OPENAI_API_KEY": "sk-very-secret", "NO_PROXY": "127.0.0.1"}
    dry = run_forked(*command(index, server, "--dry-run", "--prices", "1,4"), environment=environment)
    assert dry.returncode == 0 and dry.stdout.count("--- prompt") == 5 and server.requests == 0
    assert "cost at most" in dry.stdout and "Nothing was sent" in dry.stdout
    done = run_forked(*command(index, server, "--budget", 3000, "--concurrency", 3), environment=environment)
    assert done.returncode == 0, done.stderr
    assert "Asked " in done.stdout and "The run reached its budget" in done.stdout
    assert "secret" not in dry.stdout + done.stdout + done.stderr and server.most_at_once <= 3
    refused = run_forked(*command(index, server), environment=environment | {"OPENAI_API_KEY": "wrong"})
    assert refused.returncode == 1 and refused.stderr.count("\n") <= 3
    assert "status 401" in refused.stderr and "check the key in OPENAI_API_KEY" in refused.stderr
    copied = run_forked("label", "--copy-prompts", tmp_path / "mine")
    assert copied.returncode == 0 and (tmp_path / "mine" / "detect.txt").exists()


MISTAKES = [
    (["--endpoint", "http://localhost:1/v1"], "--endpoint needs --model"), (["--budget", "5"], "--budget is for an"),
    (["--endpoint", "localhost", "--model", "m"], "not the address")]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(index, arguments, message):
    done = run_forked("label", index, *arguments)
    assert done.returncode == 1 and message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
