"""The demo: the recipe `tiny` from text to a release and labelled features, in a few minutes on a laptop."""

import contextlib
import importlib.util
import resource
import sys
from pathlib import Path

from rich.markup import escape

from olmoscope.cli import label_tables, tables
from olmoscope.cost.measure import measure
from olmoscope.features.read import FeatureIndex
from olmoscope.features.rows_of import index_sae
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposals
from olmoscope.labelling.rule_labels import RuleLabeller
from olmoscope.labelling.run import label_features, most_important
from olmoscope.labelling.text_blocks import TextBlocks
from olmoscope.pipeline import (
    Stopwatch,
    collect_stores,
    evaluate_saes,
    release_saes,
    report_saes,
    settle_recipe,
    store_folder,
    train_saes,
)
from olmoscope.progress import console
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import Recipe
from olmoscope.text.standard_library import write_corpus
from olmoscope.train.derived import batch_of
from olmoscope.train.run import run_folder
from olmoscope.units import format_seconds

OTHER_STAGES = 0.35
"""The time of evaluation, release and index, as a share of collection and training; measured on two machines."""
LABELLED = 100
"""How many features get a label by a rule."""
FIXED_SECONDS = 15
"""The time for imports and for compiling what the index needs, if that was never done."""


def run_demo(out: Path) -> None:
    """Write the corpus, collect, train, evaluate, release, index the deepest SAE and label its most telling features.
    Work that is already done is kept.

    Raises:
        UserError: see the stages.
    """
    watch = Stopwatch()
    console.print("[bold]Olmoscope demo[/]: a tiny Olmo3 model reads the Python standard library of this machine.")
    wrote = write_corpus(out / "corpus")
    console.print(f"Corpus: {out / 'corpus'}" + ("" if wrote else " (already there)"))
    recipe = load_recipe("tiny", overrides=[f"text.sources.0.paths=['{out}/corpus/dolma/*.json.gz']",
                                            f"text.sources.1.paths=['{out}/corpus/chat/*.parquet']"])
    recipe = settle_recipe(recipe, out)
    if not (out / "recipe.yaml").exists():
        _say_how_long(recipe)
    collected = collect_stores(recipe, out)
    fresh = [fresh for _, fresh in train_saes(recipe, out, [])] + [fresh for _, fresh in evaluate_saes(recipe, out, [])]
    report = report_saes(recipe, out)[-1]
    release = release_saes(out).folder
    index = index_sae(str(run_folder(out, recipe.saes[-1])))
    opened = FeatureIndex(index.folder)
    blocks = TextBlocks(opened)
    with contextlib.closing(Proposals(index.folder / PROPOSALS_FILE, index.info.sae.d_sae)) as kept:
        labels = label_features(blocks, RuleLabeller(blocks), most_important(opened, LABELLED), kept)
        proposals = kept.by(labels.labeller, blocks.identity)

    tables.console.print()
    tables.show_stores(collected)
    tables.console.print()
    tables.show_results(recipe, out, [])
    label_tables.show_labels(index.info.sae.name, labels, proposals)
    tables.console.print(f"Store    {store_folder(out, 'train').parent}\nRuns     {out / 'runs'}\nReport   {report}\n"
                         f"Release  {release}\nIndex    {index.folder}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if any(fresh) or index.fresh:
        tables.console.print(f"Took {watch}, at most {peak / 1e9:.1f} GB of memory.")
        tables.console.print(f"Next: read what the features of {index.info.sae.name} fire on, and judge their labels: "
                             f"olmoscope browse {out}", soft_wrap=True)
        first = "" if importlib.util.find_spec("sae_lens") else escape(" (first: pip install 'olmoscope[saelens]')")
        tables.console.print(f"Check the release with SAELens: olmoscope validate {out}{first}", soft_wrap=True)
    else:
        tables.console.print("All of it was done already: nothing to do.")


def _say_how_long(recipe: Recipe) -> None:
    """Time a batch and a few steps, and say how long the demo will take on this machine."""
    rates = measure(recipe, batches=1, steps=2)
    tokens = recipe.tokens.count + recipe.tokens.held_out
    steps = -(-recipe.tokens.count // batch_of(recipe, recipe.train)) * len(recipe.saes)
    main_stages = tokens / rates.tokens_per_second + steps * rates.step_seconds
    seconds = FIXED_SECONDS + main_stages * (1 + OTHER_STAGES)
    console.print(f"This will take about {format_seconds(seconds)} on this machine.")
