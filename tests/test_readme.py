"""The Python examples of the documentation, run as printed on an output folder of the demo's recipe with few tokens:
the README's, those of docs/api.md and of the explanations, and those of the docstrings of the public names."""

import doctest
from pathlib import Path
from typing import Any

import pytest

import olmoscope
from demo_folder import make_demo, run_blocks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with `olmoscope-demo` in it."""
    return make_demo(tmp_path_factory.mktemp("demo")).parent


@pytest.fixture(autouse=True)
def inside(demo, monkeypatch):
    monkeypatch.chdir(demo)


def test_the_example_of_the_readme(capsys):
    names: dict[str, Any] = {}
    assert run_blocks(ROOT / "README.md", names) == 1
    assert capsys.readouterr().out and names["codes"].indices.shape == (8, 32)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "explanation").glob("*.md")), ids=lambda page: page.stem)
def test_the_examples_of_an_explanation(page):
    names: dict[str, Any] = {}
    assert run_blocks(page, names) == (page.stem == "hooks")
    if page.stem == "hooks":
        codes = names["taps"].codes
        assert codes.indices.shape == (*names["taps"]["layers.7"].shape[:2], 32) and (codes.values > 0).any()


def test_the_examples_of_the_page_of_the_api():
    names: dict[str, Any] = {}
    assert run_blocks(ROOT / "docs" / "api.md", names) >= len(olmoscope.__all__) - 1


def test_the_page_names_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in olmoscope.__all__ if f"\n## `{name}" not in page] == []


@pytest.mark.parametrize("name", olmoscope.__all__)
def test_the_example_of_a_public_name(name):
    value = getattr(olmoscope, name)
    value = getattr(value, "__wrapped__", value)  # of a context manager: doctest takes only what was written here
    found = doctest.DocTestFinder(recurse=False).find(value, name, globs={})
    examples = [one for one in found if one.examples]
    assert examples, f"{name} has no example"
    output: list[str] = []
    for one in examples:
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(one, out=output.append).failed == 0, (
            "".join(output))
