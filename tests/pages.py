"""Runs the blocks of a page of the documentation as printed, in order, in one process and one folder.

A `bash` block is `olmoscope` commands, a line each; a `python` block is run in the page's namespace; a `yaml` block
whose first line is `# NAME.yaml` is written to that file. `text` is output. A block below a paragraph that begins with
`*Not run by the tests: ` is left out.
"""

import json
import os
import re
import shlex
from pathlib import Path

from commands import run_forked

NOT_RUN = "*Not run by the tests: "
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

CODE = """
import json, os, sys
from olmoscope.cli import app as cli

folder, steps = json.loads(sys.argv[1])
os.chdir(folder)
names = {}
for kind, where, text in steps:
    print(f"== {where}", flush=True)
    if kind == "python":
        exec(compile(text, where, "exec"), names)
        continue
    sys.argv = ["olmoscope", *text]
    try:
        cli.main()
    except SystemExit as done:
        if done.code:
            sys.exit(f"{where}: {text}: exit status {done.code}")
"""


def blocks(page: Path) -> list[tuple[str, str, str, bool]]:
    """The language of each block, its place, its text, and whether it is run."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        before = text[:match.start()].rstrip().rpartition("\n\n")[2]
        where = f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}"
        found.append((match[1], where, match[2], not before.startswith(NOT_RUN)))
    return found


def commands(text: str, where: str) -> list[list[str]]:
    """The arguments of each command of a `bash` block."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    assert all(line[0] == "olmoscope" for line in lines if line), f"{where}: a command that is not ours; mark the block"
    return [line[1:] for line in lines if line]


def steps(page: Path, folder: Path) -> list[tuple[str, str, str | list[str]]]:
    """The steps that the page asks a reader to take; recipes are written immediately."""
    found: list[tuple[str, str, str | list[str]]] = []
    for language, where, text, run in blocks(page):
        if language == "text" or not run:
            continue
        if language == "bash":
            found += [("command", where, command) for command in commands(text, where)]
        elif language == "python":
            found.append(("python", where, text))
        elif language == "yaml" and (name := re.match(r"# ([\w-]+\.yaml)\n", text)):
            (folder / name[1]).write_text(text, encoding="utf-8")
        else:
            raise AssertionError(f"{where}: a block of {language or 'no language'} that no test runs; mark it")
    return found


def notebook_cells(path: Path) -> list[dict]:
    """The code cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run_page(page: Path, folder: Path) -> str:
    """Do what a page or a notebook says, in a folder; returns what it prints."""
    if page.suffix == ".ipynb":
        to_do = [("python", f"{page.name}:{cell['id']}", "".join(cell["source"])) for cell in notebook_cells(page)]
    else:
        to_do = steps(page, folder)
    done = run_forked(json.dumps([str(folder), to_do]), timeout=120, code=CODE, environment={
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80", "TMPDIR": str(folder)})
    assert done.returncode == 0, f"{page.name}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
