"""Which of transformers' causal LM families are read correctly, which are refused, and which are wrong.

    python benchmarks/architectures.py [--only llama,gpt2] [--json FILE] [--markdown docs/models.md]

It runs a small random model of each family (small_models.py) through collection, evaluation and indexing, and compares
each with plain transformers (architecture_checks.py). `wrong` must be 0. Each family has a process with a time limit;
two run at a time unless --processes says otherwise.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas  # noqa: F401  (imported here, as transformers below, before processes are forked)
import torch
from transformers import LlamaForCausalLM  # noqa: F401

from architecture_checks import COMMANDS, Finding, check
from architecture_tables import markdown, overall, show
from small_model_sizes import LEFT_OUT
from small_models import families, make_model

SECONDS = 180
"""A family that takes longer counts as wrong; the first one compiles kernels."""


def main() -> None:
    arguments = parse()
    names = arguments.only.split(",") if arguments.only else families()
    if unknown := sorted(set(names) - set(families())):
        sys.exit(f"no such family in this transformers: {', '.join(unknown)}")
    found = run([name for name in names if name not in LEFT_OUT], arguments.processes)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps({family: {command: vars(finding) for command, finding in findings.items()}
                                              for family, findings in found.items()}, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(found, LEFT_OUT))
    counts = Counter(overall(findings) for findings in found.values())
    print(", ".join(f"{counts[state]} {state}" for state in ("right", "in part", "refused", "wrong")),
          f"and {sum(name in LEFT_OUT for name in names)} left out")
    sys.exit(1 if counts["wrong"] else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="families, separated by commas")
    parser.add_argument("--json", type=Path, help="where all findings go")
    parser.add_argument("--markdown", type=Path, help="where the table for readers goes")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


def run(names: list[str], processes: int) -> dict[str, dict[str, Finding]]:
    """Check families, each in a process of its own; progress goes to standard error."""
    context = multiprocessing.get_context("fork")  # so that imports happen only once
    todo, found = list(names), {}
    running: dict[Connection, tuple[str, Any, float]] = {}
    while todo or running:
        while todo and len(running) < processes:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work_on, args=(todo[0], theirs))
            process.start()
            theirs.close()
            running[ours] = (todo.pop(0), process, time.monotonic())
        ready = wait(list(running), timeout=1)
        for ours, (family, process, began) in list(running.items()):
            late = time.monotonic() - began > SECONDS
            if ours not in ready and not late:
                continue
            if ours in ready:
                found[family] = received(ours)
            else:
                process.kill()
                found[family] = all_wrong(f"not finished after {SECONDS} s")
            process.join()
            del running[ours]
            print(f"{len(found)}/{len(names)} {family}: {overall(found[family])} ({time.monotonic() - began:.1f} s)",
                  file=sys.stderr, flush=True)
    return {name: found[name] for name in names}


def work_on(family: str, answer: Connection) -> None:
    """In a process of its own: make the model, check it, send the findings."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars of four commands
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix=f"architectures-{family}-") as folder:
        try:
            model = make_model(family, Path(folder) / "model")
            found = check(family, model, Path(folder) / "work")
        except Exception as error:  # noqa: BLE001  (transformers itself cannot make or run the family)
            found = all_wrong(f"the plain model: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    answer.send(found)


def received(answer: Connection) -> dict[str, Finding]:
    try:
        found: dict[str, Finding] = answer.recv()
    except EOFError:
        return all_wrong("the process died")
    return found


def all_wrong(reason: str) -> dict[str, Finding]:
    return {command: Finding("wrong", reason) for command in COMMANDS}


if __name__ == "__main__":
    main()
