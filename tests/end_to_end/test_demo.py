"""`olmoscope demo`, as a newcomer runs it: SAEs at two depths, a validated release, and no work done twice."""

import json
import subprocess
import sys

from commands import run_forked
from olmoscope.files import sha256

DEPTHS = (3, 7)


def succeeded(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_demo(tmp_path):
    out = tmp_path / "demo"
    first = succeeded(subprocess.run([sys.executable, "-m", "olmoscope", "demo", "-o", str(out)], capture_output=True,
                                     text=True))
    for name in ("store", "runs", "report.html", "release"):
        assert str(out / name) in first.replace("\n", "")
    evaluations = {path.parts[-4]: json.loads(path.read_text()) for path in (out / "runs").rglob("evaluation.json")}
    assert sorted(evaluations) == [f"layer_{depth:02d}" for depth in DEPTHS]
    for layer, figures in evaluations.items():
        print(f"{layer}: NMSE {figures['nmse']:.4f}, random directions {figures['nmse_random_directions']:.4f}, "
              f"dead {figures['dead']['share']:.2%}")
        assert figures["nmse"] < 0.5 * figures["nmse_random_directions"], layer
    before = {path: sha256(path) for path in out.rglob("*") if path.is_file()}
    assert f"olmoscope browse {out}\n" in first and f"olmoscope validate {out}\n" in first
    assert list((out / "runs" / "layer_07").rglob("index/manifest.json"))
    assert "nothing to do" in succeeded(run_forked("demo", "-o", out))
    assert {path: sha256(path) for path in out.rglob("*") if path.is_file()} == before
    assert "FAILED" not in succeeded(run_forked("validate", out))
