"""Terminals that are not UTF-8, are narrow, or are gone: every command ends properly, with characters that fit."""

import io
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from commands import run_forked
from olmoscope import terminal
from olmoscope.cli.tables import show_evaluations
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.terminal import HANDLER, Terminal, writable
from release_runs import RAW, make_out

ENCODINGS = {"ascii": {"PYTHONIOENCODING": "ascii"}, "latin-1": {"PYTHONIOENCODING": "latin-1"},
             "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}}
COMMANDS = """
import sys
from typer.main import get_command
from olmoscope.cli import app as cli

def run(*arguments):
    sys.argv = ["olmoscope", *arguments]
    try:
        cli.main()
    except SystemExit as done:
        return done.code or 0
    return 0

recipe, missing = sys.argv[1:]
for name in ("", *get_command(cli.app).commands, "store info", "store verify", "store repair"):
    assert run(*name.split(), "--help") == 0, name
for stream in (sys.stdout, sys.stderr):
    print("=== plan", file=stream, flush=True)
assert run("plan", recipe) == 0
for stream in (sys.stdout, sys.stderr):
    print("=== refused", file=stream, flush=True)
assert run("plan", missing) == 1
"""
"""One after another in one process: a new Python, which settles its encoding at its start, takes seconds of imports."""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_out(tmp_path_factory.mktemp("terminal") / "out")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_help_tables_lines_and_errors(encoding, tmp_path):
    """A recipe is UTF-8, whatever the locale says."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((resources.files("olmoscope") / "recipes" / "tiny.yaml").read_text().replace(
        "name: tiny", "name: naïve Δ 中", 1), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", COMMANDS, recipe, tmp_path / "Δ.yaml"], capture_output=True,
                          env=os.environ | ENCODINGS[encoding], timeout=240)
    assert done.returncode == 0, done.stderr
    (help_, rest), (nothing, said) = (stream.split(b"=== plan\n", 1) for stream in (done.stdout, done.stderr))
    plan, refused = rest.split(b"=== refused\n")[0], said.split(b"=== refused\n")[1]
    assert help_.count(b"Usage: olmoscope") >= 15
    assert help_.isascii() and not nothing
    assert (b"na\xefve" if encoding == "latin-1" else b"na\\xefve") + b" d \\u4e2d" in plan
    assert refused.startswith(b"error: no recipe")


def test_figures_where_letters_are_missing(out, monkeypatch):
    """Replacement characters keep the columns straight."""
    from olmoscope.cli import tables

    evaluation = read_evaluation(out / "runs" / RAW / EVALUATION)
    texts = {}
    for encoding in ("utf-8", "ascii", "latin-1"):
        written = io.BytesIO()
        monkeypatch.setattr(tables, "console", Terminal(file=io.TextIOWrapper(written, encoding, errors=HANDLER),
                                                        width=90))
        show_evaluations([evaluation])
        tables.console.file.flush()
        texts[encoding] = written.getvalue().decode(encoding)
    assert "ΔCE" in texts["utf-8"] and "dCE" in texts["ascii"] and "dCE" in texts["latin-1"]
    assert "||x - x^||^2 / ||x||^2" in texts["ascii"] and "||x - x^||² / ||x||²" in texts["latin-1"]
    head, line = (next(row for row in texts["ascii"].splitlines() if start in row) for start in ("dCE", "raw"))
    for name, figure in (("dCE", f"{evaluation.language.delta_ce:.3f}"), ("KL", f"{evaluation.language.kl:.3f}")):
        assert head.index(name) + len(name) == line.index(figure, head.index(name) - 6) + len(figure)


def test_stand_ins():
    assert writable("‖x̂‖² ≤ 中", "ascii") == "||x^||^2 <= \\u4e2d" and writable("‖x̂‖", "utf-8") == "‖x̂‖"
    name = os.fsdecode(b"caf\xe9")  # a file name that is not text, in Python's form
    for encoding in ("ascii", "utf-8", "latin-1"):
        assert name.encode(encoding, HANDLER) == b"caf\xe9"


def test_a_folder_whose_name_is_no_text(tmp_path):
    """Its name is printed with its own bytes."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102  (a Path of bytes there is not)
    done = subprocess.run([sys.executable, "-m", "olmoscope", "plan", folder], capture_output=True, timeout=240)
    assert done.returncode == 1 and folder + b" has no recipe.yaml" in done.stderr


@pytest.mark.parametrize("columns", ["0", "1", "7", "20", "no number"])
def test_a_narrow_terminal(columns):
    done = run_forked("plan", "tiny", environment=os.environ | {"COLUMNS": columns})
    assert done.returncode == 0 and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["plan", "tiny"], ["--help"], ["--version"], ["plan", "no-such-recipe"]])
def test_a_reader_that_leaves(arguments):
    for streams in ({"stdout": True}, {"stdout": True, "stderr": True}):
        read, write = os.pipe()
        os.close(read)
        ends = {name: write for name in streams} | ({} if "stderr" in streams else {"stderr": subprocess.PIPE})
        done = subprocess.run([sys.executable, "-m", "olmoscope", *arguments], **ends, timeout=240)
        os.close(write)
        assert done.returncode == 1
        assert b"Traceback" not in (done.stderr or b"") and b"Broken" not in (done.stderr or b"")


def test_output_to_a_full_disk_and_to_nowhere():
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run([sys.executable, "-m", "olmoscope", "plan", "tiny"], stdout=full,
                              stderr=subprocess.PIPE, timeout=240)
    assert done.returncode == 1 and b"no space left" in done.stderr.lower() and b"Traceback" not in done.stderr
    closed = subprocess.run(f"'{sys.executable}' -m olmoscope plan tiny >&-", shell=True, capture_output=True,
                            timeout=240)
    assert closed.returncode == 0, closed.stderr


def test_what_is_read_is_utf_8_whatever_the_locale(tmp_path):
    """The static site's own files have characters that the C locale lacks."""
    script = ("import sys; from pathlib import Path; from olmoscope.browse.export import export_site\n"
              "export_site({}, Path(sys.argv[1]))")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "site"], capture_output=True, timeout=240,
                          env=os.environ | ENCODINGS["C"])
    assert done.returncode == 0, done.stderr
    for file in (resources.files("olmoscope") / "browse" / "static").iterdir():
        if file.name.endswith((".js", ".css")):
            assert (tmp_path / "site" / file.name).read_bytes() == file.read_bytes()


def test_no_file_is_opened_in_the_encoding_of_the_locale():
    done = subprocess.run(["ruff", "check", "--preview", "--select", "PLW1514", Path(terminal.__file__).parent],
                          capture_output=True, text=True, timeout=240,
                          env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout
