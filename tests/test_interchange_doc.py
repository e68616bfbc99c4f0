"""docs/interchange.md: its tables have a row for each format that the package reads or writes, and name tests and
commands that exist."""

import re
from pathlib import Path

import pytest

from olmoscope.cli.app import app
from olmoscope.release.convert import CIRCUIT_TRACER, OF_INDEX, WRITERS
from olmoscope.sae.io import run_checkpoint, run_folder
from olmoscope.sae.io.formats import FORMATS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "interchange.md").read_text(encoding="utf-8")
OWN = (run_folder, run_checkpoint)
"""Our own format, which needs no row among those of other tools."""


def table(heading: str) -> list[dict[str, str]]:
    """The rows of the first table under a heading, by the columns' names."""
    lines = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


SAES, OF_AN_INDEX = table("SAEs"), table("From a feature index")


def is_of(row: dict[str, str], name: str) -> bool:
    """Whether a row is about the format with this name: `Gemma Scope` is not `Gemma Scope 2`."""
    return any(re.search(rf"\b{re.escape(one.removesuffix('s'))}s?\b(?! \d)", name)
               for one in row["format"].split(", "))


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in OWN], ids=lambda form: form.NAME)
def test_each_format_that_is_read_has_one_row(form):
    (row,) = [row for row in SAES if is_of(row, form.NAME)]
    assert row["read"] != "no"
    assert hasattr(form, "write") <= row["written (`export --to`)"].startswith("`")


def test_each_row_is_of_a_format():
    assert not [row["format"] for row in SAES if not any(is_of(row, form.NAME) for form in FORMATS)]


def test_each_format_that_is_written_has_one_row():
    written = [row["written (`export --to`)"] for row in SAES if row["written (`export --to`)"] != "no"]
    assert sorted(written) == sorted(f"`{one}`" for one in ("saelens", *WRITERS, CIRCUIT_TRACER))
    assert sorted(row["`--to`"] for row in OF_AN_INDEX) == sorted(f"`{one}`" for one in (*OF_INDEX, CIRCUIT_TRACER))


def test_each_row_names_tests_and_commands_that_exist():
    commands = {str(command.callback.__name__).replace("_", "-") for command in app.registered_commands
                if command.callback is not None}
    for row in (*SAES, *OF_AN_INDEX):
        named = re.findall(r"`([^`]+)`", row["by"])
        assert row["checked with"] and any(one.startswith("tests/") for one in named), row
        for one in named:
            if one.startswith("olmoscope "):
                assert one.split()[1] in commands, one
            else:  # a script that tests/foreign/ has for an owner's environment, or a test
                assert (ROOT / one).is_file(), one
                assert one.startswith("tests/foreign/") or "\ndef test_" in (ROOT / one).read_text(), one


def test_versions_are_those_that_the_tests_install():
    """For packages that constraints.txt pins; the others have environments of their own."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    said = [found for row in (*SAES, *OF_AN_INDEX)
            for found in re.findall(r"([A-Za-z][\w-]+) (\d[\w.]+\d)", row["checked with"])]
    assert ("sae-lens", pinned["sae-lens"]) in said
    assert not [(name, version) for name, version in said if pinned.get(name.lower(), version) != version]
