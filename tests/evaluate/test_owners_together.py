"""SAEs that three owners' own classes wrote, for one site of one model, in one evaluation and on one page.

tests/foreign/make.py made them, and wrote down what their owners' classes make of a text.
"""

import json
from pathlib import Path

import pytest

import olmoscope
from commands import run_forked
from olmoscope.browse.collection import open_collection
from olmoscope.evaluate.results import read_evaluation

FOLDER = Path(__file__).parents[1] / "foreign/one_site"
SAES = {"saelens": FOLDER / "saelens", "sparsify": FOLDER / "sparsify/layers.5",
        "dictionary_learning": FOLDER / "dictionary_learning"}
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(EXPECTED["text"])
    return path


def test_one_evaluate_has_the_figures_of_the_owners(text, tmp_path):
    done = run_forked("evaluate", *SAES.values(), "--model", "tiny", "--text", text, "--dtype", "float32", "-o",
                      tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for owner, folder in SAES.items():
        found = read_evaluation(tmp_path / "out" / folder.name / "evaluation.json")
        assert (found.model, str(found.site), found.rows) == ("tiny", "layers.5", EXPECTED["rows"])
        assert found.l0.mean == pytest.approx(EXPECTED[owner]["l0"], abs=1e-9)
        assert found.fvu == pytest.approx(EXPECTED[owner]["fvu"], abs=1e-5)
        assert found.files and found.language.kl > 0


def test_one_page_shows_all_three(text, tmp_path):
    for owner, folder in SAES.items():
        [index] = olmoscope.index(folder, text=text, model="tiny", out=tmp_path / "pages" / owner)
        # An index is made in bfloat16 where the processor has it.
        assert index.info.firings == pytest.approx(EXPECTED[owner]["l0"] * EXPECTED["rows"], rel=0.02)
    shown = open_collection(tmp_path / "pages", "tiny")
    assert len(shown) == len(SAES) and {one.sae().d_sae for one in shown.values()} == {24}
