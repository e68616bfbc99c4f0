"""`evaluate --text` and `index --text` read the same tokens from every kind of text: those of the texts."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import run_forked
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.features.read import FeatureIndex
from olmoscope.features.rows_of import index_sae
from olmoscope.recipe.schema import Model
from olmoscope.sae.io import saelens
from olmoscope.sae.io.saelens_places import hook_names
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.train.initialize import initialize
from release_runs import synthetic_rows

WORDS = "Numbers are kept in lists, lists in dictionaries, and these in files. " * 12
CALL = {"function": {"name": "look", "arguments": '{"at": "it"}'}}
CHAT = [{"role": "user", "content": WORDS},
        {"role": "assistant", "content": None, "reasoning_content": "I think. " * 9, "tool_calls": [CALL]}]
AS_TEXT = (f"<|im_start|>user\n{WORDS}<|im_end|>\n<|im_start|>assistant\n<think>\n{'I think. ' * 9}\n</think>\n\n\n"
           '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call><|im_end|>\n')
KINDS = {
    "plain.txt": WORDS, "text.jsonl": {"text": WORDS}, "chats.jsonl": {"messages": CHAT},
    "text.parquet": {"text": WORDS, "url": "u"}, "chats.parquet": {"messages": CHAT},
    "json.parquet": {"messages": json.dumps(CHAT)},
    "sharegpt.jsonl": {"conversations": [{"from": "human", "value": WORDS}]},
}


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae") / "sae"
    rows = synthetic_rows(256)
    saelens.write(initialize(256, 64, 4, "none", rows.mean(0), seed=0), folder, {
        "model_name": "tiny", "prepend_bos": False, "context_size": 64, **hook_names("model.layers", Site(1))})
    return folder


def write(path, value):
    if path.suffix == ".txt":
        path.write_text(value)
    elif path.suffix == ".jsonl":
        path.write_text(json.dumps(value) + "\n")
    else:
        pq.write_table(pa.table({key: [inner] for key, inner in value.items()}), path)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(sae, tmp_path, name):
    value = KINDS[name]
    write(tmp_path / name, value)
    wanted = (f"<|im_start|>user\n{WORDS}<|im_end|>\n" if name == "sharegpt.jsonl" else
              AS_TEXT if isinstance(value, dict) and "messages" in value else WORDS)
    ids = load_tokenizer(Model(name="tiny")).encode([wanted])[0]
    indexed = index_sae(str(sae), text=str(tmp_path / name), out=tmp_path / "index", device="cpu")
    assert np.array_equal(FeatureIndex(indexed.folder).corpus.tokens_T, ids)
    [one] = evaluate_anywhere([str(sae)], Options(tmp_path / "out", str(tmp_path / name)))
    assert read_evaluation(one.folder / EVALUATION).rows == len(ids)


@pytest.mark.parametrize("column", ["text", "messages"])
def test_a_hub_dataset(sae, hub_endpoint, tmp_path, column):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", {column: WORDS if column == "text" else CHAT})
    hub_endpoint.add("dataset", f"someone/{column}", folder)
    ids = load_tokenizer(Model(name="tiny")).encode([WORDS if column == "text" else AS_TEXT])[0]
    for command, out in (("index", "index"), ("evaluate", "out")):
        done = run_forked(command, sae, "--text", f"someone/{column}", "--out", tmp_path / out,
                          environment=hub_endpoint.environment(tmp_path / "hf"), hub=True)
        assert done.returncode == 0, done.stderr
    assert np.array_equal(FeatureIndex(tmp_path / "index").corpus.tokens_T, ids)
    assert read_evaluation(tmp_path / "out" / "sae" / EVALUATION).rows == len(ids)
