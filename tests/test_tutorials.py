"""Every command and Python block of the tutorials runs as printed, on the tiny model and without a network."""

from pathlib import Path

import pytest

from pages import NOT_RUN, blocks, commands, notebook_cells, run_page

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "tutorials" / "first-hour.ipynb"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder that all tutorials share, after the first one."""
    folder = tmp_path_factory.mktemp("tutorials")
    run_page(DOCS / "tutorials" / "first-sae.md", folder)
    return folder


@pytest.mark.slow
def test_the_first_tutorial(folder):
    run = folder / "first" / "runs" / "layer_05" / "width_1024" / "topk_16_raw_untied"
    assert all((run / name).exists() for name in ("done.json", "evaluation.json", "report.html", "index/manifest.json"))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in TUTORIALS if page.stem not in ("index", "first-sae")],
                         ids=lambda page: page.stem)
def test_a_tutorial(page, folder):
    assert run_page(page, folder)


@pytest.mark.slow
def test_the_notebook(tmp_path):
    printed = run_page(NOTEBOOK, tmp_path)
    assert "by gradient" in printed and "mutual nearest" in printed


def test_what_the_notebook_shows_is_of_one_run_of_all_cells():
    """`make notebook` writes it."""
    cells = notebook_cells(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]}
    assert kinds == {("stream", "stdout"), ("execute_result", None)}


def test_blocks_that_are_not_run_say_why():
    for page in TUTORIALS:
        marked = [where for _, where, _, run in blocks(page) if not run]
        assert page.read_text(encoding="utf-8").count(NOT_RUN) == len(marked), f"{page.name}: a mark is above no block"


def test_a_command_that_is_not_ours_must_be_marked():
    assert commands("olmoscope plan tiny  # what it costs\nolmoscope collect \\\n  tiny\n", "here") == [
        ["plan", "tiny"], ["collect", "tiny"]]
    with pytest.raises(AssertionError, match="mark the block"):
        commands("pip install olmoscope\n", "here")
