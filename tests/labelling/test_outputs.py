"""Output tokens that labels are judged by: those of the index, and those that change when a feature is clamped."""

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from chat_endpoint import ChatEndpoint
from feature_index import small_index
from olmoscope.errors import UserError
from olmoscope.features.read import FeatureIndex
from olmoscope.features.records import Token
from olmoscope.labelling.clamp import TEXTS, Clamping
from olmoscope.labelling.examples import FeatureExamples, examples_of
from olmoscope.labelling.model_examples import promoted_tokens
from olmoscope.labelling.model_run import Asking, ask_endpoint, plan_asking
from olmoscope.labelling.outputs import candidates, told_apart
from olmoscope.labelling.prompts import one_line
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposals
from olmoscope.labelling.rule_labels import RuleLabeller, score_rule
from olmoscope.labelling.rules import Rule
from olmoscope.labelling.run import label_features, most_important
from olmoscope.labelling.text_blocks import TextBlocks
from olmoscope.sae.io.open import open_sae


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> TextBlocks:
    return TextBlocks(FeatureIndex(small_index(tmp_path_factory.mktemp("index"))))


@pytest.fixture(scope="module")
def clamping(blocks: TextBlocks) -> Clamping:
    return Clamping(blocks, "cpu")


@pytest.fixture(scope="module")
def examples(blocks: TextBlocks, clamping: Clamping) -> list[FeatureExamples]:
    made = [examples_of(blocks, number, clamping) for number in most_important(blocks.index, 8)]
    return [one for one in made if isinstance(one, FeatureExamples)]


def test_risen_and_fallen_tokens_are_those_of_plain_transformers(blocks: TextBlocks, clamping: Clamping,
                                                                 examples: list[FeatureExamples]) -> None:
    index = blocks.index
    model = transformers.AutoModelForCausalLM.from_pretrained(resources.files("olmoscope") / "model" / "tiny",
                                                              dtype=clamping._model.module.dtype)
    sae = open_sae(str(index.path / index.info.sae.where)).sae
    number = examples[0].feature.index
    amount = examples[0].feature.max

    def clamp(module: object, arguments: object, output: torch.Tensor) -> torch.Tensor:
        x_BD = output.flatten(0, 1)
        z_BF = sae.encode(x_BD).to_dense()
        return (x_BD.float() + (amount - z_BF[:, number].float())[:, None] * sae.W_dec[number].float()).to(
            output.dtype).view_as(output)

    with torch.no_grad():
        usual = model(clamping._ids_BT).logits.double().softmax(2).mean((0, 1))
        layer = model.get_decoder().layers[index.info.sae.site.layer]
        layer.register_forward_hook(clamp)
        clamped = model(clamping._ids_BT).logits.double().softmax(2).mean((0, 1))
    change = ((clamped + 1e-4) / (usual + 1e-4)).log()[:len(index.tokens)]
    order = np.argsort(-change.numpy())
    risen, fallen = [token.id for token in examples[0].risen], [token.id for token in examples[0].fallen]
    assert len(risen) == len(fallen) == 10
    least = float(change[order[9]])
    assert all(float(change[one]) >= least - 0.05 for one in risen)  # bfloat16 may swap two at the boundary
    assert all(float(change[one]) <= float(change[order[-10]]) + 0.05 for one in fallen)
    assert len(set(risen) & set(order[:10].tolist())) >= 8
    assert len(clamping._ids_BT) == TEXTS
    held_out = {place for block in blocks.of_part("score") for place in blocks.ids_T[
        blocks.starts_B[block]:blocks.ends_B[block]].tolist()}
    assert set(clamping._ids_BT.flatten().tolist()) <= held_out


def test_tokens_that_look_alike_are_not_asked_about(examples: list[FeatureExamples]) -> None:
    risen = (Token(1, " cat"), Token(2, "cat"), Token(3, "dog"), Token(4, " "))
    one = replace(examples[0], risen=risen, fallen=(Token(5, "dog "), Token(6, "<|im_end|>"), Token(7, "\n")))
    asked = candidates(one, 0)["clamped"]
    assert {(each.token.id, each.likelier) for each in asked} == {(1, True), (6, False), (7, False)}
    assert all("<|" not in each.shown and each.shown for each in asked)
    assert candidates(one, 0) == candidates(one, 0)
    assert "clamped" not in candidates(replace(one, fallen=()), 0)
    assert told_apart(candidates(one, 0), "clamped", [float(each.likelier) for each in asked]).value == 1.0


def test_no_explainer_sees_the_promoted_tokens_that_labels_are_judged_by(blocks: TextBlocks,
                                                                          examples: list[FeatureExamples]) -> None:
    for one in examples:
        judged = [each.token.text for each in candidates(one, blocks.seed)["output"] if each.likelier]
        assert judged and one.promoted and not set(judged) & set(one.promoted)
        assert {*judged, *one.promoted} <= {each.token.text for each in one.feature.promoted or ()}
        assert promoted_tokens(one) == [one_line([text]) for text in one.promoted]


def test_a_rule_about_what_follows_is_scored_and_others_are_not(blocks: TextBlocks, examples: list[FeatureExamples]
                                                                ) -> None:
    one = examples[0]
    rule = Rule("tokens", "next", tuple(sorted(token.id for token in one.risen)), (1.0,) * len(one.risen))
    scores = score_rule(blocks, rule, one)
    assert scores.clamped is not None and scores.clamped.value == 1.0 and scores.clamped.low > 0.5
    assert scores.clamped_tokens == len(candidates(one, blocks.seed)["clamped"]) and scores.output is not None
    assert score_rule(blocks, replace(rule, on="this"), one).clamped is None
    promoted = score_rule(blocks, replace(rule, shape="promoted"), one)
    assert promoted.output is None and promoted.clamped == scores.clamped, "it is made of these tokens"
    unclamped = score_rule(blocks, rule, replace(one, risen=(), fallen=()))
    assert unclamped.clamped is None and unclamped.clamped_tokens == 0


def answers(numbers: object) -> object:
    """An endpoint that gives every feature the same label, and names these numbers."""
    return lambda prompt: json.dumps({"label": "some words"} if '"label"' in prompt else {"numbers": numbers}
                                     if '"numbers"' in prompt else {"number": 1} if '"number"' in prompt
                                     else {"percent": 50})


def test_a_models_label_is_asked_about_once_for_each_side(blocks: TextBlocks, clamping: Clamping,
                                                          examples: list[FeatureExamples], tmp_path: Path) -> None:
    number, sides = examples[0].feature.index, candidates(examples[0], blocks.seed)
    likelier = [place for place, one in enumerate(sides["clamped"], 1) if one.likelier]
    proposals = Proposals(tmp_path / "p", 512)
    last = f"{len(sides['clamped'])}: "  # the other side has fewer tokens

    def answer(prompt: str) -> str:
        return answers(likelier if f"\n{last}" in prompt else [1])(prompt)  # type: ignore[operator,no-any-return]

    with ChatEndpoint(answer) as server:
        plan = plan_asking(blocks, Asking(server.url, "m"), [number], proposals, clamping)
        assert '"numbers"' in plan.prompts[-1]
        ask_endpoint(blocks, Asking(server.url, "m"), [number], proposals, clamping)
        asked = [prompt for prompt in server.prompts() if '"numbers"' in prompt]
        schemas = [body["response_format"]["json_schema"]["schema"]["properties"] for body in server.asked]
    assert len(asked) == 2 and {"numbers": {"type": "array", "items": {"type": "integer"}}} in schemas
    scores = proposals.best()[number].scores
    assert scores.clamped is not None and scores.clamped.value == 1.0
    assert scores.output is not None and scores.clamped_tokens == len(sides["clamped"])
    for wrong in ([0], [99], ["1"], "1"):  # an answer that cannot be used is unknown
        with ChatEndpoint(answers(wrong)) as server:  # type: ignore[arg-type]
            ask_endpoint(blocks, Asking(server.url, "m"), [number], proposals, clamping)
        scores = next(one.scores for one in proposals.of(number) if server.url in one.labeller)
        assert scores.output is scores.clamped is None and sum(scores.failed.values()) == 2
        assert scores.detection is not None


def test_labels_without_clamping_are_made_again_and_keep_their_verdict(blocks: TextBlocks, clamping: Clamping,
                                                                       examples: list[FeatureExamples]) -> None:
    labeller, wanted = RuleLabeller(blocks), [one.feature.index for one in examples]
    proposals = Proposals(blocks.index.path / PROPOSALS_FILE, 512)
    plain = label_features(blocks, labeller, wanted, proposals)
    first = proposals.by(labeller.name, blocks.identity)
    proposals.judge(first[0].id, "accepted")
    clamped = label_features(blocks, labeller, wanted, proposals, clamping=clamping)
    again = proposals.by(labeller.name, blocks.identity)
    assert clamped.labelled == plain.labelled and clamped.before == plain.asked - plain.labelled
    assert [one.label for one in again] == [one.label for one in first] and again[0].verdict == "accepted"
    assert all(one.scores.clamped_tokens for one in again)
    for more in (None, clamping):
        assert label_features(blocks, labeller, wanted, proposals, clamping=more).before == len(wanted)


def test_a_model_that_has_changed_is_refused(blocks: TextBlocks) -> None:
    info = blocks.index.info
    blocks.index.info = info.model_copy(update={"model": info.model.model_copy(update={"revision": "sha256:other"})})
    try:
        with pytest.raises(UserError, match="have changed since"):
            Clamping(blocks, "cpu")
    finally:
        blocks.index.info = info
