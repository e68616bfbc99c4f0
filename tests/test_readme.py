"""The README's Python examples, run as printed: its blocks in order, in one process, on an output folder of the demo's
recipe with few tokens."""

import re
from pathlib import Path

import pytest

from helpers import write_documents
from olmoscope.pipeline import collect_stores, evaluate_saes, settle_recipe, train_saes
from olmoscope.recipe.load import load_recipe
from olmoscope.release.build import build_release

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def demo(tmp_path):
    """`olmoscope-demo` as the demo makes it, in a folder of its own."""
    write_documents(tmp_path / "corpus")
    out = tmp_path / "olmoscope-demo"
    sources = f"[{{kind: dolma, name: modules, paths: ['{tmp_path}/corpus/*.json.gz']}}]"
    recipe = settle_recipe(load_recipe("tiny", overrides=[
        f"text.sources={sources}", "text.mixture={modules: 1.0}", "text.held_out_share=0.2", "tokens.count=2000",
        "tokens.held_out=300", "evaluate.tokens=300"]), out)
    collect_stores(recipe, out)
    for stage in (train_saes, evaluate_saes):
        list(stage(recipe, out, []))
    build_release(out)
    return tmp_path


def test_the_examples_run_in_order_as_they_are_printed(demo, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    monkeypatch.chdir(demo)
    names = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    assert capsys.readouterr().out
    codes = names["codes"]
    assert codes.indices.shape == (names["captured"]["x"].shape[1], 32) and (codes.values > 0).any()
