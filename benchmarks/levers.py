"""Levers that are not settings of the product: one of our runs is trained again with a lever and evaluated as before.

    python benchmarks/levers.py OUT RUN [RUN ...] [--levers NAME ...]

OUT is an output folder with its stores, RUN a finished run in it: an SAE of one site. It is trained again on the same
rows, from the same initial weights, by the package's own step, losses and kernels, with one lever added; so a lever
that wins would cost the same in the product. Results are in OUT/levers/RUN/NAME.json and are made only once; the first
line of the table is the run itself; runs that differ in their seed get a table of means as well. The SAE is
OUT/levers/RUN/NAME in SAELens' format: `olmoscope evaluate FOLDER --absorption --probing` measures probing and
absorption. Studies vary the settings of the product (recipes/quality.yaml, form `settings`; recipes/smollm2-sites.yaml,
form `variants`). Shapes as in olmoscope.train.step.
"""

import argparse
import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path

from lever_spaces import read_by_the_model, whitened
from lever_step import Levers, LeverStep
from olmoscope.activations.stream.batches import Stream
from olmoscope.evaluate.results import write_evaluation
from olmoscope.model.load import pick_device
from olmoscope.release.export import saelens_metadata
from olmoscope.release.finished_run import read_run
from olmoscope.sae.io import saelens
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.topk import TopK
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.derived import settled
from olmoscope.train.run import Run
from runs_of import evaluate, means, recipe_and_coder, rounds_of, table

SAMPLE = 2**15
"""Minimum number of training rows for the covariance used in whitening."""
LEVERS = {
    "data rows": Levers(data_rows=True),
    "data rows, encoder 0.1": Levers(data_rows=True, encoder_scale=0.1),
    "encoder 0.5": Levers(encoder_scale=0.5),
    "encoder 0.3": Levers(encoder_scale=0.3),
    "warmup 0.05": Levers(warmup=0.05),
    "resampling": Levers(resample=100_000),
    "k from 128": Levers(anneal=128),
    "Multi-TopK": Levers(multi=4),
    "clipped to 0.03": Levers(clip=0.03),
    "EMA 0.999": Levers(ema=0.999),
    "Signum, rate 0.1": Levers(optimiser="signum", rate=0.1),
    "Signum, rate 0.3": Levers(optimiser="signum", rate=0.3),
    "Muon, rate 0.1": Levers(optimiser="muon", rate=0.1),
    "Muon, rate 0.3": Levers(optimiser="muon", rate=0.3),
    "moments restart": Levers(restarts=(0.2, 0.5)),
    "rates by firing": Levers(row_rates=0.25),
    "aligned": Levers(aligned=True),
    "frequency": Levers(frequency=1.0),
    "rare rows decay": Levers(rare_decay=10.0),
    "whitened": Levers(space="whitened"),
    "read by the model": Levers(space="read by the model"),
}


def main() -> None:
    """Read the arguments, train and measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", help="ids of SAEs")
    parser.add_argument("--levers", nargs="*", default=list(LEVERS), choices=list(LEVERS), metavar="NAME",
                        help=f"of: {', '.join(LEVERS)}")
    arguments = parser.parse_args()
    for run in arguments.runs:
        folder = arguments.out / "levers" / run
        ours = open_sae(arguments.out / "runs" / run)
        metadata = saelens_metadata(read_run(arguments.out / "runs" / run))
        for name in arguments.levers:
            if (folder / f"{name}.json").exists():
                continue
            sae = train(arguments.out, run, LEVERS[name]).at(ours.reads)
            saelens.write(sae, folder / name, metadata)
            evaluation = evaluate(arguments.out, replace(ours, sae=sae, name=name, identity=name))
            write_evaluation(folder / f"{name}.json", evaluation)
        print(table(arguments.out, run, folder))
    if len(arguments.runs) > 1:
        print(means(arguments.out, arguments.runs, [arguments.out / "levers" / run for run in arguments.runs]))


def train(out: Path, run: str, levers: Levers) -> TopK:
    """Train a run again, with levers."""
    recipe, spec = recipe_and_coder(out, run)
    rounds, settings, device = rounds_of(out, run), settled(recipe, spec), pick_device("cpu")
    if levers.space == "read by the model" and settings.axes != "channels":
        raise SystemExit(f"{run}: the model's metric is along the channels, and this run has train.axes: "
                         f"{settings.axes}; name a run without")
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Stream(rounds, settings.batch)) as stream:
        training = Run(recipe, spec, rounds, Path(folder), device)
        x_ND = rounds.sample(spec.site, max(spec.d_sae, SAMPLE))
        if training.ends.sinks is not None:
            x_ND = training.ends.sinks.split(x_ND)[1]
        x_ND = training.ends.turned(x_ND)
        space = None
        if levers.space == "whitened":
            space = whitened(x_ND)
        elif levers.space == "read by the model":
            space = read_by_the_model(recipe, spec, rounds, out)
        training.step = LeverStep(recipe, spec, training.step.sae, levers, training.steps, x_ND, space)
        for _ in range(training.steps):
            training.train_on(stream.next_batch(), stream.state())
        return read_checkpoint(checkpoints(Path(folder))[-1])


if __name__ == "__main__":
    main()
