"""The files beside the code agree with it: versions, workflows, the checks at a commit, pins."""

import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from olmoscope import __version__
from olmoscope.cli.app import app

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_changelog_and_the_citation_are_of_this_version():
    released = re.findall(r"^## (\d\S+) - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.MULTILINE)
    citation = yaml.safe_load(read("CITATION.cff"))
    assert released[0] == (__version__, citation["date-released"]) and citation["version"] == __version__
    assert [date for _, date in released] == sorted((date for _, date in released), reverse=True)
    headings = set(re.findall(r"^### (.*)$", read("CHANGELOG.md"), re.MULTILINE))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_what_is_there(path):
    text = path.read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step["uses"]) for step in steps if "uses" in step)
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    ran = {step["run"] for step in steps if "run" in step}
    assert {command.removeprefix("make ") for command in ran - {".ci/run"}} <= targets
    classifiers = tomllib.loads(read("pyproject.toml"))["project"]["classifiers"]
    tested = re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    assert jobs["tests"]["strategy"]["matrix"]["python"] == tested


def test_every_command_is_in_the_table_of_commands():
    """The rest of that page is generated; the table at its head is not."""
    table = read("docs/reference/commands.md")
    assert [name for name in typer.main.get_command(app).commands if f"| `olmoscope {name}" not in table] == []


def test_a_commit_is_checked_by_the_tools_of_the_environment():
    [repository] = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    assert all(hook["entry"].startswith(".venv/bin/") for hook in repository["hooks"])
    assert {"ruff", "mypy"} <= {hook["id"] for hook in repository["hooks"]}


def test_every_pin_of_an_extra_is_in_the_constraints():
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in read("constraints.txt").splitlines()}
    names = [re.match(r"[\w.-]+", one)[0] for extra in extras.values() for one in extra]
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    assert wanted - {"olmoscope"} <= pinned
