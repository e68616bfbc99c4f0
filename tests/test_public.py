"""`import olmoscope` gives ten names, imports each when it is first used, and loads nothing heavy before."""

import subprocess
import sys

import pytest

import olmoscope

NAMES = {"load", "open_store", "Site", "SparseCoder", "SparseCodes", "attach", "collect", "train", "evaluate", "index"}
HEAVY = ("torch", "numpy", "transformers", "pydantic", "yaml", "rich", "typer", "numba", "datasets")


def in_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_list_of_names():
    assert set(olmoscope.__all__) == NAMES and len(olmoscope.__all__) == 10
    assert {name for name in dir(olmoscope) if not name.startswith("__")} == NAMES
    for name in NAMES:
        assert getattr(olmoscope, name).__name__ == name and getattr(olmoscope, name).__doc__
    namespace: dict[str, object] = {}
    exec("from olmoscope import *", namespace)
    assert set(namespace) - {"__builtins__"} == NAMES


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'olmoscope' has no attribute 'nothing'"):
        _ = olmoscope.nothing
    with pytest.raises(ImportError, match="nothing"):
        from olmoscope import nothing  # noqa: F401


def test_nothing_heavy_is_imported():
    loaded = in_new_process("import olmoscope, sys; dir(olmoscope); print(*sys.modules)").split()
    assert [name for name in HEAVY if name in loaded] == []
    assert {name for name in loaded if name.startswith("olmoscope")} == {"olmoscope", "olmoscope.threads"}


@pytest.mark.parametrize("code", [
    "import olmoscope.train.run, olmoscope; f = olmoscope.train",
    "import olmoscope; olmoscope.train; import olmoscope.train.run; f = olmoscope.train",
    "from olmoscope import train as f; from olmoscope.train.run import run_folder"])
def test_a_function_keeps_its_name_beside_a_folder_of_that_name(code):
    assert in_new_process(code + "; print(f.__module__, f.__name__)") == "olmoscope.api train\n"


@pytest.mark.slow
def test_a_type_checker_sees_the_types(tmp_path):
    """mypy of a user's file, with the package found as an installed one is."""
    (tmp_path / "user.py").write_text("""\
import olmoscope, torch
reveal_type(olmoscope.load)
reveal_type(olmoscope.train)
reveal_type(olmoscope.evaluate("x")[0].fvu)
reveal_type(olmoscope.load("x").encode)
with olmoscope.attach(torch.nn.Linear(1, 1), olmoscope.load("x"), mode="splice") as taps:
    reveal_type(taps["layers.7"])
    reveal_type(taps.codes)
olmoscope.nothing
""")
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--python-executable", sys.executable, "user.py"],
                          capture_output=True, text=True, cwd=tmp_path)
    lines = done.stdout.splitlines()

    def said(number: int) -> str:
        return " ".join(line for line in lines if line.startswith(f"user.py:{number}:"))

    assert "SparseCoder" in said(2) and "list[pathlib.Path]" in said(3) and '"float"' in said(4), done.stdout
    assert "SparseCodes" in said(5) and "splice" in said(6) and "Tensor" in said(7) and "SparseCodes" in said(8)
    assert "nothing" in said(9)
