"""All measurements on a GPU in one command of a few minutes, from a checkout that is not installed.

    python tools/gpu_day.py --out FOLDER [--minutes 9] [--parts kernels,step] [--peers PYTHON]
    python tools/gpu_day.py --out FOLDER --device cpu --small       a small rehearsal without a GPU

The parts, in order of importance, are scripts in benchmarks/; their docstrings say what they measure:

    kernels   are the kernels right on this device?     kill      a killed training run and an uninterrupted one
    step      the training step at full size            collect   a model of 7B parameters, four layers to disk
    plan      predicted and measured memory             peers     other trainers (only with --peers)
    profile   the time of a step, by kernel

Each is a process of its own with a share of the remaining minutes; it is killed when they are over. A part writes its
results at once (PART.json, until it ends). FOLDER/gpu_day.json (hardware, versions, commit, and each part's status,
figures and lines) is written again after each part, so an interrupted run keeps its results. FOLDER/PART.log has all
output of a part.

It needs Python with torch and safetensors, but no network. If a part lacks a module, it says which, and the next part
begins. The exit status is 0 if every part was done.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from olmoscope.files import read_json, write_json
from olmoscope.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"kernels": 120, "step": 160, "plan": 20, "profile": 30, "kill": 60, "collect": 160, "peers": 90}
"""In order of importance, with the seconds that each is expected to take: the remaining time is divided in
proportion."""
LEAST_SECONDS = 2
"""A part does not begin with less than this left."""
DONE, FAILED, LACKING, OUT_OF_TIME = "done", "failed", "lacks a module", "out of time"
LACKS = re.compile(r"ModuleNotFoundError: No module named '([^']+)'")
MACHINE = """
import json, torch
gpu = torch.cuda.is_available() and torch.cuda.get_device_properties(0)
print(json.dumps({"cuda": torch.version.cuda} | (
    {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "multiprocessors": gpu.multi_processor_count,
     "capability": f"{gpu.major}.{gpu.minor}"} if gpu else {"gpu": None})))
"""
"""Runs in a process of its own: a process that asks torch about the GPU holds some of its memory until it ends."""


@dataclass
class Outcome:
    """How a part ended."""

    status: str
    reason: str | None
    seconds: float
    lines: list[str]
    results: dict[str, Any] | None
    """As far as the part got."""


def main() -> None:
    options = parsed()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ending this process also ends the part
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "gpu_day.json").exists():
        sys.exit(f"{options.out} holds a GPU day already; choose another --out")
    day: dict[str, Any] = {"provenance": provenance(), "device": options.device, "small": options.small,
                           "minutes": options.minutes, "hardware": hardware(), "parts": {}}
    if options.device == "cuda" and day["hardware"]["gpu"] is None:
        sys.exit("torch sees no GPU here; use --device cpu --small for a rehearsal without one")
    print(describe(day), flush=True)
    for number, name in enumerate(options.parts):
        later = [PARTS[other] for other in options.parts[number:]]
        outcome = run(name, options, (end - time.monotonic()) * PARTS[name] / sum(later))
        day["parts"][name] = vars(outcome)
        write_json(options.out / "gpu_day.json", day)
        (options.out / f"{name}.json").unlink(missing_ok=True)
        print(f"{name}: {outcome.status} after {outcome.seconds:.0f} s", flush=True)
    print(table(day))
    sys.exit(any(part["status"] != DONE for part in day["parts"].values()))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results go")
    parser.add_argument("--minutes", type=float, default=9, help="for everything (default: 9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, for a rehearsal")
    parser.add_argument("--parts", help="only these, separated by commas")
    parser.add_argument("--peers", metavar="PYTHON", help="Python of an environment with the other trainers")
    options = parser.parse_args()
    wanted = options.parts.split(",") if options.parts else [name for name in PARTS if name != "peers" or options.peers]
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--parts: there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    if "peers" in wanted and not options.peers:
        parser.error("--parts peers: give --peers PYTHON too")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu is a rehearsal: add --small")
    options.parts = [name for name in PARTS if name in wanted]
    return options


def run(name: str, options: argparse.Namespace, seconds: float) -> Outcome:
    """Run a part as a process; when the seconds are over, kill it and all its child processes."""
    if seconds < LEAST_SECONDS:
        return Outcome(OUT_OF_TIME, "no time was left to begin", 0, [], None)
    command = [sys.executable, str(ROOT / "benchmarks" / f"gpu_{name}.py"), "--out", str(options.out), "--device",
               options.device, *(["--small"] if options.small else []),
               *(["--peers", options.peers] if options.peers else [])]
    log, scratch = options.out / f"{name}.log", tempfile.mkdtemp(prefix="gpu_day-")
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TMPDIR": scratch, "HF_HUB_OFFLINE": "1"}
    start, status = time.monotonic(), None
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment,
                                       start_new_session=True)
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with contextlib.suppress(ProcessLookupError):  # free the GPU for the next part
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    kept = read_json(options.out / f"{name}.json") if (options.out / f"{name}.json").exists() else {}
    ending, reason = judged(status, log, seconds)
    return Outcome(ending, reason, round(time.monotonic() - start, 1), kept.get("lines", []), kept.get("results"))


def judged(status: int | None, log: Path, seconds: float) -> tuple[str, str | None]:
    """A part's status and the reason in one line, from its exit status (None: its time was over) and its last
    output."""
    if status == 0:
        return DONE, None
    if status is None:
        return OUT_OF_TIME, f"it was killed after {seconds:.0f} s"
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = said[-1][:300] if said else "it said nothing"
    if lacking := LACKS.search(last):
        return LACKING, lacking[1]
    return FAILED, last if status > 0 else f"killed by {signal.Signals(-status).name}; it said last: {last}"


def hardware() -> dict[str, Any]:
    """GPU, its driver, processor; None if unknown."""
    asked = subprocess.run([sys.executable, "-c", MACHINE], capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"torch does not work here: {(asked.stderr.strip().splitlines() or ['no message'])[-1]}")
    driver = None
    if shutil.which("nvidia-smi"):
        answer = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                capture_output=True, text=True)
        driver = answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else None
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    found: dict[str, Any] = json.loads(asked.stdout)
    return found | {"driver": driver, "cpu": models[0] if models else None, "cores": os.cpu_count()}


def describe(day: dict[str, Any]) -> str:
    """The machine and the versions, in one line."""
    machine, versions = day["hardware"], day["provenance"]["libraries"]
    memory = f", {machine['gpu_memory_bytes'] / 1e9:.0f} GB, driver {machine['driver']}" if machine["gpu"] else ""
    commit = (day["provenance"]["commit"] or "no commit")[:12]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers"))
    return f"{machine['gpu'] or 'no GPU'}{memory}; {machine['cpu']}, {machine['cores']} cores; {libraries}; {commit}"


def table(day: dict[str, Any]) -> str:
    """The summary at the end: a line for each part, and its findings below."""
    lines = ["", describe(day), f"{'part':9} {'status':15} {'seconds':>7}"]
    for name, part in day["parts"].items():
        lines.append(f"{name:9} {part['status']:15} {part['seconds']:7.0f}  {part['reason'] or ''}".rstrip())
        lines += [f"    {line}" for line in part["lines"]]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped by a signal; the results so far are in the folder")
