"""Models by their hub id: which commit they are at, and that a whole run uses that commit."""

from importlib import resources
from pathlib import Path

from commands import run_forked
from hub_endpoint import COMMIT

TINY = Path(str(resources.files("olmoscope") / "model" / "tiny"))

LOAD = """
import sys, torch
from olmoscope.site import Site
from olmoscope.model.load import load_model
from olmoscope.model.splice import load_causal_lm
from olmoscope.model.unembed import load_unembedding
from olmoscope.model_source import pinned
from olmoscope.recipe.schema import Model

model, cpu = Model(name=sys.argv[1], dtype="float32"), torch.device("cpu")
print(pinned(model).revision, load_model(model, [Site(1)], cpu).revision, load_causal_lm(model, cpu).revision,
      load_unembedding(model, cpu).revision)
"""


def test_the_commit_of_a_hub_model(hub_endpoint, tmp_path):
    """From an empty cache, from a filled one, and offline: the commit that `main` is."""
    hub_endpoint.add("model", "someone/small", TINY)
    environment = hub_endpoint.environment(tmp_path / "hf")
    for more in ({}, {}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = run_forked("someone/small", environment=environment | more, hub=True, code=LOAD)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [COMMIT] * 4
