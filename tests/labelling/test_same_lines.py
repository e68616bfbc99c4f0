"""Rules and models are judged on the same lines by the same code, and an intruder that nobody names is unknown."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from chat_endpoint import ChatEndpoint
from olmoscope.labelling.examples import FeatureExamples, examples_of
from olmoscope.labelling.model_examples import FIRING, GROUPS, intruder_groups, judged_lines, marked_lines
from olmoscope.labelling.model_run import Asking, ask_endpoint
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposal, Proposals
from olmoscope.labelling.rule_labels import RuleLabeller, score_rule
from olmoscope.labelling.run import label_features
from olmoscope.labelling.text_blocks import TextBlocks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from planted_index import PlantedIndex

FEATURES = (0, 3, 6)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> TextBlocks:
    index = PlantedIndex(each=3, tokens=20_000)
    index.path = tmp_path_factory.mktemp("planted")  # type: ignore[attr-defined]
    return TextBlocks(index)  # type: ignore[arg-type]


def examples_by_number(blocks: TextBlocks) -> dict[int, FeatureExamples]:
    found = {number: examples_of(blocks, number) for number in FEATURES}
    assert all(isinstance(one, FeatureExamples) for one in found.values())
    return found  # type: ignore[return-value]


def asked_of(blocks: TextBlocks, answer: Callable[[str], str], folder: Path) -> dict[int, Proposal]:
    proposals = Proposals(folder / PROPOSALS_FILE, 12)
    with ChatEndpoint(answer) as server:
        ask_endpoint(blocks, Asking(server.url, "m"), FEATURES, proposals)
    return proposals.best()


def as_rule(blocks: TextBlocks) -> Callable[[str], str]:
    """A model that gives each line the value of the feature's rule; labels say which feature it is."""
    values: dict[tuple[str, str], float] = {}
    for number, examples in examples_by_number(blocks).items():
        rule = blocks.index.planted[number].rule  # type: ignore[attr-defined]
        for line in (*judged_lines(examples, blocks.seed),
                     *(line for group in intruder_groups(examples, blocks.seed) for line in group.lines)):
            values[f"feature {number}", line.text] = float(rule.values(blocks, line.places).max())
        for line in marked_lines(examples, blocks.seed):
            values[f"feature {number}", line.text] = float(rule.values(blocks, line.marked).mean())

    def answer(prompt: str) -> str:
        lines = prompt.splitlines()
        if '"label"' in prompt:
            explained = set(re.findall(r"\w+", " ".join(lines[2:11])))
            return json.dumps({"label": f"feature {numbers[frozenset(explained)]}"})
        label = lines[0].removeprefix("Feature: ")
        if '"number"' in prompt:
            found = [values[label, line.partition(": ")[2]] for line in lines[3:8]]
            return json.dumps({"number": found.index(min(found)) + 1})
        return json.dumps({"percent": 100 * values[label, lines[1].partition(": ")[2]]})

    from olmoscope.labelling.model_examples import explaining_lines

    numbers = {frozenset(re.findall(r"\w+", " ".join(explaining_lines(examples)))): number
               for number, examples in examples_by_number(blocks).items()}
    return answer


def test_a_model_that_answers_as_a_rule_does_gets_the_rules_scores(blocks: TextBlocks, tmp_path: Path) -> None:
    by_model = asked_of(blocks, as_rule(blocks), tmp_path)
    for number, examples in examples_by_number(blocks).items():
        rule = blocks.index.planted[number].rule  # type: ignore[attr-defined]
        ruled, asked = score_rule(blocks, rule, examples), by_model[number].scores
        assert ruled.on_lines == asked.on_lines and set(asked.on_lines) == {"detection", "fuzzing"}
        assert asked.on_lines["detection"] == asked.detection and asked.on_lines["fuzzing"] == asked.fuzzing
        assert asked.intruder is not None and ruled.intruder is not None
        assert abs(ruled.intruder.value - asked.intruder.value) <= 0.8, "ties count as their chance"
        assert ruled.positives > asked.positives == 8, "a rule is measured on more text, too"


def test_proposals_of_a_feature_are_ordered_by_the_lines_that_they_share(blocks: TextBlocks, tmp_path: Path) -> None:
    proposals = Proposals(tmp_path / PROPOSALS_FILE, 12)
    label_features(blocks, RuleLabeller(blocks), FEATURES, proposals)
    rule = proposals.best()[0]
    assert rule.worth == rule.scores.on_lines["detection"].low
    assert rule.scores.detection is not None and rule.scores.detection.low > rule.worth, "from more text"
    proposals.import_lines([json.dumps({**json.loads(line), "labeller": "a model", "rule": None, "scores": {
        "detection": {"value": 1.0, "low": rule.worth + 0.01, "high": 1.0}}}) for line in proposals.export()])
    assert proposals.best()[0].labeller == "a model"


def test_groups_have_one_line_without_a_firing(blocks: TextBlocks) -> None:
    examples = examples_by_number(blocks)[0]
    groups = intruder_groups(examples, blocks.seed)
    assert len(groups) == GROUPS and groups == intruder_groups(examples, blocks.seed)
    for group in groups:
        assert [line.fires for line in group.lines].count(False) == 1 and len(group.lines) == FIRING + 1
        assert not group.lines[group.intruder].fires
    assert len({group.intruder for group in groups}) > 1
    places = [line.places for group in groups for line in group.lines]
    assert len(set(places)) == len(places), "no line twice"
    explained = {sample.document for sample in examples.explain}
    held_out = {sample.document for sample in examples.score}
    assert not explained & held_out
    few = replace(examples, score=(*examples.firing()[:2 * FIRING - 1], *examples.silent(9)))
    assert len(intruder_groups(few, blocks.seed)) == 1


@pytest.mark.parametrize(("named", "reason"), [
    ({"number": 6}, "the answer names a number that was not asked about"),
    ({"number": 0}, "the answer does not fit its schema: number: greater_than_equal"), ({}, "missing")])
def test_an_intruder_that_is_not_named_is_unknown(blocks: TextBlocks, tmp_path: Path, named: dict[str, int],
                                                  reason: str) -> None:
    groups = {number: intruder_groups(one, blocks.seed) for number, one in examples_by_number(blocks).items()}
    right = {group.lines[0].text: group.intruder + 1 for group in groups[0]}
    first = next(iter(right))

    def answer(prompt: str) -> str:
        if '"number"' not in prompt:
            return json.dumps({"label": "x"} if '"label"' in prompt else {"percent": 50})
        line = prompt.splitlines()[3].partition(": ")[2]
        return json.dumps({"number": right[line]} if line in right and line != first else named)

    best = asked_of(blocks, answer, tmp_path)
    found = best[0].scores.intruder
    assert found is not None and found.value == 1.0, "what is not known is in no share"
    assert found.low == pytest.approx((GROUPS - 1) / (GROUPS - 1 + 1.959963984540054**2))
    assert [best[number].scores.intruder for number in FEATURES[1:]] == [None, None]
    assert sum(count for why, count in best[0].scores.failed.items() if reason in why) == 1
    assert sum(best[3].scores.failed.values()) == len(groups[3])
