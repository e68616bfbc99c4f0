"""The demo: the recipe `tiny` from text to a validated release and features to read, in a few minutes on a laptop."""

import resource
import sys
from pathlib import Path

from olmoscope import tables
from olmoscope.features.rows_of import index_sae
from olmoscope.pipeline import Stopwatch, collect_stores, evaluate_saes, report_saes, store_folder, train_saes
from olmoscope.progress import console
from olmoscope.recipe_file import load_recipe
from olmoscope.release.build import build_release
from olmoscope.text.standard_library import write_corpus
from olmoscope.train.run import run_folder


def run_demo(out: Path) -> None:
    """Write the corpus, collect, train, evaluate, release, index the deepest SAE; what is there already is kept.

    Raises:
        UserError: see the stages.
    """
    watch = Stopwatch()
    console.print("[bold]Olmoscope demo[/]: a tiny Olmo3 model reads the Python standard library of this machine.")
    wrote = write_corpus(out / "corpus")
    console.print(f"Corpus: {out / 'corpus'}" + ("" if wrote else " (there already)"))
    recipe = load_recipe("tiny", overrides=[f"text.sources.0.paths=['{out}/corpus/dolma/*.json.gz']",
                                            f"text.sources.1.paths=['{out}/corpus/chat/*.parquet']"])
    collected = collect_stores(recipe, out)
    fresh = [fresh for _, fresh in train_saes(recipe, out, [])] + [fresh for _, fresh in evaluate_saes(recipe, out, [])]
    report = report_saes(recipe, out)[-1]
    release = build_release(out).folder
    index = index_sae(str(run_folder(out, recipe.saes[-1])))

    tables.console.print()
    tables.show_stores(collected)
    tables.console.print()
    tables.show_results(recipe, out, [])
    tables.console.print(f"Store    {store_folder(out, 'train').parent}\nRuns     {out / 'runs'}\nReport   {report}\n"
                         f"Release  {release}\nIndex    {index.folder}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if any(fresh) or index.fresh:
        tables.console.print(f"Took {watch}, at most {peak / 1e9:.1f} GB of memory. Next: olmoscope validate {out}")
        tables.console.print(f"Read what the features of {index.info.sae.name} fire on: olmoscope browse {out}")
    else:
        tables.console.print("All of it was there already: nothing to do.")
