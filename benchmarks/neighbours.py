"""The cost of busy neighbours: collection and training alone, and with one busy process on each core.

    python benchmarks/neighbours.py [--rounds 3] [--seconds 6] [--json FILE]

With one neighbour per core, a fair share is half of the speed without neighbours. It is measured twice: with the
threads as olmoscope sets them (threads.py: waiting threads soon sleep) and with OpenMP's own default (waiting threads
spin). Bar: at least 0.8 of the fair share and, without neighbours, no loss compared with spinning. Each measurement has
a process of its own; medians of the rounds.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoscope.site import Site

SPINNING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""The default behaviour of libgomp and Intel's OpenMP."""
WAYS: dict[str, dict[str, str]] = {"ours": {}, "spinning": SPINNING}
BAR = 0.8


def measure(seconds: float) -> dict[str, float]:
    """Tokens per second through the tiny model, and rows per second of training steps, in this process."""
    import olmoscope  # noqa: F401  (sets the threads, so it comes before torch)

    # isort: split
    import torch

    from olmoscope.model.capture import read_sites
    from olmoscope.model.load import load_model
    from olmoscope.recipe.schema import Model
    from olmoscope.train.adam import Adam
    from olmoscope.train.initialize import initialize
    from olmoscope.train.step import Step

    torch.manual_seed(0)
    model = load_model(Model(name="tiny", dtype="float32"), [Site(3), Site(7)], torch.device("cpu"))
    token_ids_BT = torch.randint(4096, (16, 256))
    x_BD = torch.randn(2048, 256)
    step = Step(initialize(256, 4096, 32, "none", torch.zeros(256), seed=0, tied=False), Adam((0.9, 0.999), 1e-8))

    def rate(call: Any, units: int) -> float:
        call()
        call()
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            call()
            done += units
        return done / (time.perf_counter() - started)

    return {"collection": rate(lambda: read_sites(model.module, list(model.sites.places.values()), token_ids_BT),
                               token_ids_BT.numel()),
            "training": rate(lambda: step(x_BD, 1e-4), len(x_BD))}


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Busy processes, one on each of the first cores."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    code = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    running = [subprocess.Popen([sys.executable, "-c", code, str(core)]) for core in cores]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def in_a_process(environment: dict[str, str], seconds: float) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--worker", "--seconds", str(seconds)],
                          env=os.environ | environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of each measurement")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.seconds)))
        return
    cores = len(os.sched_getaffinity(0))
    rates: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(arguments.rounds):
        for way, environment in WAYS.items():
            for company, count in (("alone", 0), ("beside", cores)):
                with neighbours(count):
                    for work, rate in in_a_process(environment, arguments.seconds).items():
                        rates.setdefault((work, way, company), []).append(rate)
    median = {key: statistics.median(values) for key, values in rates.items()}
    results = []
    for work in ("collection", "training"):
        for way in WAYS:
            alone, beside = median[work, way, "alone"], median[work, way, "beside"]
            share = beside / (alone / 2)
            lost = alone / median[work, "spinning", "alone"]
            verdict = "" if way == "spinning" else f"  bar {BAR}: {'met' if share >= BAR else 'NOT MET'}"
            print(f"{work:10} {way:8}  alone {alone:9,.0f}/s ({lost:.2f} of spinning)  beside {beside:9,.0f}/s  "
                  f"{share:.2f} of the fair share{verdict}")
            results.append({"work": work, "way": way, "alone": alone, "beside": beside, "of_fair_share": share,
                            "rounds": {company: rates[work, way, company] for company in ("alone", "beside")}})
    if arguments.json:
        from common import hardware
        from olmoscope.provenance import provenance

        arguments.json.write_text(json.dumps(
            {"benchmark": "neighbours", "date": time.strftime("%Y-%m-%d"), "hardware": hardware("cpu"),
             "provenance": provenance(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
