"""A hub that does not answer is asked once per process, for a bounded time; a local folder needs no hub."""

import contextlib
import socket
import threading
from importlib import resources
from pathlib import Path

import pytest

from commands import run_forked
from hub_endpoint import Trouble

TINY = Path(str(resources.files("olmoscope") / "model" / "tiny"))
SECONDS = {"HF_HUB_ETAG_TIMEOUT": "1"}

FILL = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1])
"""
"""Every file that the repository has; which files it lacks, the cache does not know."""

LOAD = """
import sys, torch
from huggingface_hub import constants
from olmoscope.model.load import load_model
from olmoscope.model.splice import load_causal_lm
from olmoscope.model_source import pinned
from olmoscope.recipe.schema import Model
from olmoscope.site import Site

for name in sys.argv[1:]:
    model, cpu = Model(name=name, dtype="float32"), torch.device("cpu")
    pinned(model)
    load_model(model, [Site(1)], cpu)
    load_causal_lm(model, cpu)
print(constants.HF_HUB_OFFLINE)
"""


class Silent:
    """A server that accepts connections and never answers."""

    def __init__(self):
        self.connections = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                self.connections.append(self._socket.accept()[0])

    def close(self):
        self._socket.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def silent():
    server = Silent()
    yield server
    server.close()


@pytest.fixture
def cached(hub_endpoint, tmp_path):
    """The environment of a process whose cache has `someone/small`, though not that adapter_config.json is missing."""
    hub_endpoint.add("model", "someone/small", TINY)
    environment = hub_endpoint.environment(tmp_path / "hf")
    assert run_forked("someone/small", environment=environment, hub=True, code=FILL).returncode == 0
    return environment | SECONDS


def test_a_cached_model_waits_once_for_a_silent_hub(cached, silent):
    """For two models in one process, that is one request, though several of their optional files are unknown."""
    done = run_forked("someone/small", "someone/small", environment=cached | {"HF_ENDPOINT": silent.url}, hub=True,
                      code=LOAD, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(silent.connections) == 1
    assert done.stdout.split() == ["False"], "the libraries are left as they were"
    assert "Retrying" not in done.stderr


def test_a_cached_model_with_a_closed_port(cached):
    done = run_forked("someone/small", environment=cached | {"HF_ENDPOINT": "http://127.0.0.1:9"}, hub=True, code=LOAD,
                      timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr


def test_a_local_folder_asks_nobody(cached, silent):
    done = run_forked(TINY, environment=cached | {"HF_ENDPOINT": silent.url}, hub=True, code=LOAD, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not silent.connections


@pytest.mark.parametrize("arguments", [
    ("inspect", "someone/saes"), ("pull", "someone/saes"), ("evaluate", "someone/saes")], ids=lambda words: words[0])
def test_what_is_not_here_is_one_line(silent, hub_endpoint, tmp_path, arguments):
    """One request, and an error soon after: these requests of huggingface_hub have no time limit of their own."""
    if arguments[0] == "pull":
        arguments += (tmp_path / "pulled",)
    done = run_forked(*arguments, environment=hub_endpoint.environment(tmp_path / "hf") | SECONDS
                      | {"HF_ENDPOINT": silent.url}, hub=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot ") and f"no network: {silent.url} did not answer" in last, done.stderr
    assert len(silent.connections) == 1


def test_a_hub_that_answered_is_asked_again(hub_endpoint, tmp_path):
    """After an answer, the libraries' own retries apply."""
    hub_endpoint.add("model", "someone/small", TINY)
    hub_endpoint.troubles.append(Trouble(r"model\.safetensors", after=100, times=1))
    done = run_forked("someone/small", environment=hub_endpoint.environment(tmp_path / "hf"), hub=True, code=LOAD,
                      timeout=60)
    assert done.returncode == 0, done.stderr
