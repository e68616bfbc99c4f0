"""Rules of planted features are found, their intervals hold the truth, and labels of other features score at chance."""

import re
import sys
from pathlib import Path

import pytest

from olmoscope.labelling.examples import NEGATIVES, FeatureExamples, TooFew, examples_of, marks
from olmoscope.labelling.rule_labels import RuleLabeller
from olmoscope.labelling.text_blocks import SHARES, TextBlocks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from labels import planted
from planted_index import PlantedIndex


@pytest.fixture(scope="module")
def index() -> PlantedIndex:
    return PlantedIndex(each=8, tokens=60_000)


def test_rules_are_found_and_scored_truly(index: PlantedIndex) -> None:
    figures = planted(index)
    found = [one for of_kind in figures.found.values() for one in of_kind]
    assert len(found) == 32 and sum(found) >= 0.95 * len(found), figures.found
    assert sum(figures.covered) >= 0.9 * len(figures.covered)
    assert sum(figures.of_others) / len(figures.of_others) == pytest.approx(0.5, abs=0.05)


def test_no_document_explains_and_scores(index: PlantedIndex) -> None:
    blocks = TextBlocks(index)  # type: ignore[arg-type]
    for number in range(0, 32, 4):
        found = examples_of(blocks, number)
        assert isinstance(found, FeatureExamples)
        assert not {one.document for one in found.explain} & {one.document for one in found.score}
        again = TextBlocks(index)  # type: ignore[arg-type]
        assert found == examples_of(again, number), "the same whenever it is asked for"
        fires = dict(zip(*(each.tolist() for each in index.firing_values(number)), strict=True))
        for one in (*found.explain, *found.score):
            assert [fires.get(place, 0.0) for place in one.places] == list(one.values)
            assert any(one.values) == (one.kind == "fires")
        assert {one.kind for one in found.score} <= {"fires", *NEGATIVES}
        few = found.few(4)
        assert [one.kind for one in few[:4]] == ["fires"] * 4 and len(few) == 8


def test_another_seed_puts_documents_elsewhere(index: PlantedIndex) -> None:
    one, two = (TextBlocks(index, seed) for seed in (0, 1))  # type: ignore[arg-type]
    assert one.identity != two.identity and (one.part_B != two.part_B).any()
    shares = [(one.part_B == part).mean() for part in range(3)]
    assert shares == pytest.approx(list(SHARES.values()), abs=0.15)


def test_false_marks_are_on_silent_tokens(index: PlantedIndex) -> None:
    found = examples_of(TextBlocks(index), 0)  # type: ignore[arg-type]
    assert isinstance(found, FeatureExamples)
    for sample in found.score:
        values = dict(zip(sample.places, sample.values, strict=True))
        for real, places in marks(sample, 0):
            assert places and all((values[place] > 0) == real for place in places)


def test_a_feature_that_fires_too_seldom_has_no_label(index: PlantedIndex) -> None:
    blocks = TextBlocks(index)  # type: ignore[arg-type]
    places, values = index._firings[0]
    index._firings[0] = places[:3], values[:3]
    try:
        found = examples_of(blocks, 0)
        assert isinstance(found, TooFew) and "under 5 pieces of text" in found.reason
    finally:
        index._firings[0] = places, values


def test_rules_in_words(index: PlantedIndex) -> None:
    blocks = TextBlocks(index)  # type: ignore[arg-type]
    labeller, said = RuleLabeller(blocks), {}
    for number in range(0, 32, 8):
        examples = examples_of(blocks, number)
        assert isinstance(examples, FeatureExamples)
        said[index.planted[number].kind] = labeller.label(examples).label  # type: ignore[union-attr]
    word = index.tokens.text(index.planted[0].rule.ids[0])
    assert said["token"] in (f"“{word}”", f"the word “{word.strip()}” in any form")
    before, this = index.tokens.texts(index.planted[8].rule.ids)
    assert said["bigram"] == f"“{this}” after “{before}”"
    begins = re.fullmatch("tokens that begin with “(.+)”", said["prefix"])
    assert begins and index.planted[16].rule.text.startswith(begins[1])  # no other syllable begins like this
    assert said["position"] == "the first token of a sequence"
