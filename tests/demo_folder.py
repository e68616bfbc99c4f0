"""`olmoscope-demo` as the demo makes it, but with few tokens: the examples of the documentation run on it."""

import re
from pathlib import Path
from typing import Any

from helpers import write_documents
from olmoscope.pipeline import collect_stores, evaluate_saes, settle_recipe, train_saes
from olmoscope.recipe.load import load_recipe
from olmoscope.release.build import build_release


def make_demo(folder: Path) -> Path:
    """Write `olmoscope-demo` into a folder: stores, runs, evaluations, a release; returns its path."""
    write_documents(folder / "corpus")
    out = folder / "olmoscope-demo"
    sources = f"[{{kind: dolma, name: modules, paths: ['{folder}/corpus/*.json.gz']}}]"
    recipe = settle_recipe(load_recipe("tiny", overrides=[
        f"text.sources={sources}", "text.mixture={modules: 1.0}", "text.held_out_share=0.2", "tokens.count=2000",
        "tokens.held_out=300", "evaluate.tokens=300"]), out)
    collect_stores(recipe, out)
    for stage in (train_saes, evaluate_saes):
        list(stage(recipe, out, []))
    build_release(out)
    return out


def run_blocks(document: Path, names: dict[str, Any]) -> int:
    """Run the Python blocks of a document as printed, in order, in one namespace; returns how many."""
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{document.name}, Python block {number}", "exec"), names)
    return len(blocks)
