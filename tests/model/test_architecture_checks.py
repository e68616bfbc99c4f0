"""benchmarks/architecture_checks.py notices what it is meant to: wrong values, late refusals, tracebacks."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import architecture_checks
from architecture_checks import COMMANDS, Finding, check, finding_of
from olmoscope.errors import UserError
from small_models import make_model


def test_a_refusal_is_one_line_before_anything_is_packed(tmp_path):
    def refuse(line):
        raise UserError(line)

    assert finding_of(lambda: refuse("no"), tmp_path) == Finding("refused", "no")
    assert finding_of(lambda: refuse("no\nand no"), tmp_path).state == "wrong"
    (tmp_path / "store" / "tokens").mkdir(parents=True)
    assert finding_of(lambda: refuse("no"), tmp_path) == Finding("wrong", "refused only after packing: no")


def test_a_traceback_is_wrong_and_says_where_it_comes_from(tmp_path):
    found = finding_of(lambda: {}["layers"], tmp_path)
    assert found.state == "wrong"
    assert found.reason.startswith("KeyError: 'layers' (test_architecture_checks.py:")


def test_other_rows_than_the_plain_models_are_wrong(tmp_path, monkeypatch):
    """Rows and figures of a model that the package reads correctly, compared with another model."""
    model = make_model("llama", tmp_path / "model")
    other = make_model("llama", tmp_path / "other", seed=1)
    plain = architecture_checks.PlainModel
    monkeypatch.setattr(architecture_checks, "PlainModel", lambda folder, path: plain(other, path))
    found = check("llama", model, tmp_path / "work")
    assert [found[command].state for command in COMMANDS] == ["wrong", "wrong", "wrong", "right"]
    assert found["collect"].reason.startswith("rows of layer 1: 500 of 500 differ")
    assert found["evaluate"].reason.startswith("ce_clean of layer 1:")


def test_a_small_model_has_all_kinds_of_layers_and_its_seeds_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(make_model("gemma3_text", tmp_path / str(number), seed))
              for number, seed in enumerate((0, 0, 1))]
    assert models[0].config.layer_types == ["sliding_attention", "full_attention"] * 2
    states = [model.state_dict() for model in models]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("family", ["xlnet", "reformer"])
def test_what_has_no_residual_stream_is_right_only_when_refused(family, tmp_path, monkeypatch):
    for name in ("_check_rows", "_check_figures", "_check_index"):
        monkeypatch.setattr(architecture_checks, name, lambda *arguments: None)
    found = check(family, tmp_path / "model", tmp_path / "work")
    assert {finding.state for finding in found.values()} == {"wrong"}
