"""Ranks that are killed under torchrun, which restarts them, give the same result (benchmarks/kill_ranks.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_ranks.py"


def test_killed_ranks_are_started_again_and_the_result_is_the_same(tmp_path):
    report = tmp_path / "report.json"
    done = subprocess.run([sys.executable, SCRIPT, "--kills", "2", "--json", report], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to a run that nothing disturbed" in done.stdout
    found = json.loads(report.read_text())
    assert len(found["kills"]) == 2 and found["differ"] == found["left"] == []
