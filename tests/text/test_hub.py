"""Datasets on the hub: streamed through `datasets` from a hub on this machine, in one process for all the checks."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import run_forked
from hub_endpoint import HubEndpoint

CODE = """
import json, sys
from olmoscope.errors import UserError
from olmoscope.recipe.schema import Text
from olmoscope.text.mixture import Mixture

def text(*sources):
    return Text.model_validate({"sources": [{"kind": "hub", "name": f"s{n}"} | s for n, s in enumerate(sources)],
                                "mixture": {f"s{n}": 1 for n in range(len(sources))}, "held_out_share": 0})

def rows(mixture):
    return [(d.source, d.id, d.text) for d in mixture]

def trouble(**source):
    try:
        rows(Mixture(text(source), 0, "train"))
    except UserError as error:
        return str(error)

results = {}
both = text({"repo": "someone/texts"}, {"repo": "someone/chats", "column": "messages"})
whole = Mixture(both, 0, "train")
order, states = [], [whole.state_dict()]
for document in whole:
    order.append((document.source, document.id, document.text))
    states.append(whole.state_dict())
results["order"] = order
results["resumed"] = []
again = Mixture(both, 0, "train")
for done in range(0, len(order), 8):
    again.load_state_dict(json.loads(json.dumps(states[done])))
    results["resumed"].append(rows(again) == order[done:])
results["lines"] = rows(Mixture(text({"repo": "someone/lines", "column": "body"}), 0, "train"))
results["no repository"] = trouble(repo="someone/nothing")
results["no split"] = trouble(repo="someone/texts", split="validation")
results["no config"] = trouble(repo="someone/texts", config="en")
results["no revision"] = trouble(repo="someone/texts", revision="v9")
results["no column"] = trouble(repo="someone/texts", column="body")
results["wrong type"] = trouble(repo="someone/texts", column="number")
results["damaged"] = trouble(repo="someone/damaged")

recipe = Text.model_validate({
    "sources": [{"kind": "chat", "name": "chats", "repo": "someone/chats", "format": "chatml"},
                {"kind": "dolma", "name": "web", "url_list": "hf://datasets/someone/web/urls/list.txt"}],
    "mixture": {"chats": 1, "web": 1}, "held_out_share": 0})
results["recipe"] = rows(Mixture(recipe, 0, "train"))
try:
    Mixture(Text.model_validate({"sources": [{"kind": "chat", "name": "chats", "repo": "someone/texts",
                                              "files": "*.csv"}], "mixture": {"chats": 1}}), 0, "train")
except UserError as error:
    results["no match"] = str(error)
print(json.dumps(results))
"""


def _repositories(hub: HubEndpoint, root: Path) -> None:
    for shard in range(3):
        for name in ("texts", "chats", "damaged"):
            (root / name / "data").mkdir(parents=True, exist_ok=True)
        ids = [f"{shard}/{row}" for row in range(8)]
        pq.write_table(pa.table({"text": [f"text {each}" for each in ids], "id": ids, "number": list(range(8))}),
                       root / f"texts/data/train-{shard:05}-of-00003.parquet", row_group_size=3)
        messages = [[{"role": "user", "content": f"question {each}"}] for each in ids]
        pq.write_table(pa.table({"messages": messages}), root / f"chats/data/train-{shard:05}-of-00003.parquet")
    (root / "damaged/data/train.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (root / "lines").mkdir()
    (root / "lines/train.jsonl").write_text('{"body": "one"}\n{"body": "two", "id": 5}\n')
    (root / "web/urls").mkdir(parents=True)
    (root / "web/0.json").write_text('{"text": "from the web", "id": "w"}\n')
    (root / "web/urls/list.txt").write_text("hf://datasets/someone/web/0.json\n")
    for name in ("texts", "chats", "damaged", "lines", "web"):
        hub.add("dataset", f"someone/{name}", root / name)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("hub")
    with HubEndpoint() as hub:
        _repositories(hub, root / "repositories")
        done = run_forked(environment=hub.environment(root / "hf"), hub=True, code=CODE)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_streams_texts_and_chats(results: dict[str, Any]) -> None:
    texts = sorted(tuple(row[1:]) for row in results["order"] if row[0] == "s0")
    assert texts == [(f"{s}/{r}", f"text {s}/{r}") for s in range(3) for r in range(8)]
    chats = sorted(tuple(row[1:]) for row in results["order"] if row[0] == "s1")
    assert chats == [(f"someone/chats/{s}:{r + 1}", f"user: question {s}/{r}") for s in range(3) for r in range(8)]
    assert results["lines"] == [["s0", "someone/lines/0:1", "one"], ["s0", "5", "two"]]


def test_goes_on_from_anywhere(results: dict[str, Any]) -> None:
    assert results["resumed"] == [True] * 6


@pytest.mark.parametrize(("case", "message"), [
    ("no repository", "source s0: dataset someone/nothing: Dataset 'someone/nothing' doesn't exist"),
    ("no split", "source s0: dataset someone/texts: Bad split: validation"),
    ("no config", "source s0: dataset someone/texts: BuilderConfig 'en' not found"),
    ("no revision", "source s0: dataset someone/texts: someone/texts has no revision 'v9'"),
    ("no column", "source s0: dataset someone/texts has no column 'body'; it has text, id, number"),
    ("wrong type", "source s0: 24 of 24 rows are malformed"),
    ("damaged", "source s0: dataset someone/damaged"),
    ("no match", "source chats: dataset someone/texts has no file that matches '*.csv'"),
])
def test_mistakes_are_named(results: dict[str, Any], case: str, message: str) -> None:
    assert results[case].startswith(message)
    assert "\n" not in results[case]


def test_the_real_recipes_kinds_of_sources(results: dict[str, Any]) -> None:
    assert ["web", "w", "from the web"] in results["recipe"]
    assert ["chats", "train-00001-of-00003.parquet:3", "<|im_start|>user\nquestion 1/2<|im_end|>\n"] \
        in results["recipe"]
    assert len(results["recipe"]) == 25


def test_offline(tmp_path: Path, hub_endpoint: HubEndpoint) -> None:
    code = """
from olmoscope.recipe.schema import Text
from olmoscope.text.mixture import Mixture
Mixture(Text.model_validate({"sources": [{"kind": "hub", "name": "web", "repo": "someone/texts"}],
                             "mixture": {"web": 1}}), 0, "train")
"""
    environment = hub_endpoint.environment(tmp_path / "hf") | {"HF_HUB_OFFLINE": "1"}
    done = run_forked(environment=environment, hub=True, code=code)
    assert done.returncode == 1
    assert "UserError: source web: dataset someone/texts is streamed from the hub, which HF_" in done.stderr
    assert "network" not in done.stderr.splitlines()[-1]
