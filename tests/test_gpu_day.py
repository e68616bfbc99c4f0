"""The GPU day as a real process: a small rehearsal of all of it on a CPU; parts that hang, die or lack something."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CONTESTANTS = {"step", "step, touched rows", "step, bf16 moments", "step, candidates", "step, untied",
               "step, auxiliary"}


def gpu_day(script, out, *options, **environment):
    """Run it; returns its output, its JSON and its exit status."""
    done = subprocess.run([sys.executable, script, "--out", out, "--device", "cpu", "--small", *options], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "OLMOSCOPE_KERNELS": "reference"} | environment)
    assert (out / "gpu_day.json").exists(), done.stdout
    return done.stdout, json.loads((out / "gpu_day.json").read_text()), done.returncode


def test_all_of_it_runs_small_on_a_cpu(tmp_path):
    bare = tmp_path / "python"  # an environment in which nothing is installed
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    printed, day, status = gpu_day(ROOT / "tools" / "gpu_day.py", tmp_path / "out", "--peers", str(bare))
    parts = day["parts"]
    assert list(parts) == ["kernels", "step", "plan", "profile", "kill", "collect", "peers"], printed
    assert [name for name, part in parts.items() if part["status"] != "done"] == ["peers"], printed
    assert status == 1
    results = {name: part["results"] for name, part in parts.items()}

    assert all(one["ok"] for one in results["kernels"]["full_size"].values())
    assert results["kernels"]["whole_step"] == "ok"
    assert results["kernels"]["tests"]["passed"] > 5 and not results["kernels"]["tests"]["wrong"]
    shapes = results["step"]["shapes"]
    assert list(shapes) == ["131k, 4096", "131k, 256", "131k, 32768", "163k, 4096"]
    for one in shapes.values():
        assert one.keys() == CONTESTANTS | {"torch product", "our product"}
        for name in CONTESTANTS:
            assert one[name]["ms"] > 0 and one[name]["rows_per_s"] > 0 and 0 < one[name]["share_of_our_product"] < 2
    for shape, contestants in results["plan"]["shapes"].items():
        assert contestants.keys() == CONTESTANTS
        for name, memory in contestants.items():
            assert memory["predicted_bytes"] > 0
            assert memory["measured_bytes"] == shapes[shape][name]["peak_bytes"]
    assert results["profile"]["slowest"] == max(results["profile"]["kernels"], key=lambda kernel: kernel["seconds"])
    product = next(kernel for kernel in results["profile"]["kernels"] if kernel["name"] == "aten::addmm")
    assert product["flops_per_s"] > 0
    assert 0 < results["kill"]["killed_at"] < results["kill"]["steps"]
    assert all(results["kill"]["equal"].values())
    assert results["collect"]["eager"]["tokens_per_s"]["four"] > 0
    assert results["collect"]["eager"]["written_bytes_per_s"] > 0
    assert 0 < results["collect"]["eager"]["four_over_bare"] < 2
    assert parts["peers"]["reason"] == "sparsify: lacks sparsify; saelens: lacks sae_lens"

    assert day["hardware"].keys() >= {"gpu", "driver", "cpu", "cores"}
    assert day["provenance"]["libraries"]["torch"] and day["provenance"]["date"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["gpu_day.json", *(f"{name}.log" for name in parts)])
    for part in parts.values():
        for line in part["lines"]:
            assert line.rstrip() in printed


STUBS = {
    "kernels": """
import json, subprocess, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
(out / "kernels.json").write_text(json.dumps({"lines": ["half of it"], "results": {"half": 1}}))
(out.parent / "child").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
time.sleep(600)
""",
    "step": "print('fine')",
    "plan": "raise ValueError('this part is broken')",
    "profile": "import no_such_module",
    "kill": "import os, signal; print('here', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "collect": "raise SystemExit('2 things are wrong')",
}


def test_a_part_that_hangs_or_dies_costs_the_others_nothing(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "tools" / "gpu_day.py", tmp_path / "tools")
    (tmp_path / "src").symlink_to(ROOT / "src")
    for name, stub in STUBS.items():
        (tmp_path / "benchmarks" / f"gpu_{name}.py").write_text(stub)
    printed, day, status = gpu_day(tmp_path / "tools" / "gpu_day.py", tmp_path / "out", "--minutes", "1.5")
    found = {name: (part["status"], part["reason"]) for name, part in day["parts"].items()}
    hung = found.pop("kernels")
    assert hung[0] == "out of time" and hung[1].startswith("it was killed after")
    assert day["parts"]["kernels"]["results"] == {"half": 1}
    assert found == {
        "step": ("done", None),
        "plan": ("failed", "ValueError: this part is broken"),
        "profile": ("lacks a module", "no_such_module"),
        "kill": ("failed", "killed by SIGKILL; it said last: here"),
        "collect": ("failed", "2 things are wrong")}, printed
    assert status == 1
    assert "half of it" in printed and (tmp_path / "out" / "step.log").read_text() == "fine\n"
    child = Path("/proc") / (tmp_path / "child").read_text()
    end = time.monotonic() + 10
    while child.exists() and "State:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < end, "what a part has started outlives it"
        time.sleep(0.05)


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "gpu_day.json").write_text("{}")
    for options, message in (
            (["--out", tmp_path, "--device", "cpu", "--small"], f"{tmp_path} holds a GPU day already"),
            (["--out", tmp_path / "new", "--device", "cpu"], "--device cpu is a rehearsal: add --small"),
            (["--out", tmp_path / "new", "--parts", "kernels,steps"], "--parts: there is no part 'steps'"),
            (["--out", tmp_path / "new", "--parts", "peers"], "--parts peers: give --peers PYTHON too")):
        done = subprocess.run([sys.executable, ROOT / "tools" / "gpu_day.py", *options], capture_output=True, text=True)
        assert done.returncode and message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
