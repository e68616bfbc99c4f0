"""Grids: the runs that a recipe's lists become, their names, and what is refused."""

import typing

import pytest
import yaml

from helpers import recipe
from olmoscope.errors import UserError
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.names import plain_text
from olmoscope.recipe.schema import CoderConfig, Train
from olmoscope.recipe.study import LISTS

SMALL = {"layer": 1, "d_sae": 512, "k": 8}


def loaded(tmp_path, *saes, overrides=(), **changes):
    """The recipe from a file with these entries of `saes`."""
    tree = yaml.safe_load(recipe(tmp_path, **changes).to_yaml()) | {"saes": list(saes)}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    return load_recipe(str(tmp_path / "job.yaml"), overrides=list(overrides))


def test_a_list_spans_a_grid(tmp_path):
    job = loaded(tmp_path, SMALL | {"k": [8, 16], "train": {"lr": [1e-3, 2e-3], "seed": [0, 1, 2]}}, SMALL | {"k": 4})
    ids = [sae.id for sae in job.saes]
    assert len(ids) == 13 and ids[0] == "layer_01/width_512/topk_8_raw_lr-1e-3_seed-0"
    assert ids[11:] == ["layer_01/width_512/topk_16_raw_lr-2e-3_seed-2",
                        "layer_01/width_512/topk_4_raw"]
    trains = [job.train_of(sae) for sae in job.saes]
    assert [(sae.k, train.lr, train.seed) for sae, train in zip(job.saes, trains, strict=True)][4:7] == [
        (8, 2e-3, 1), (8, 2e-3, 2), (16, 1e-3, 0)]
    assert trains[-1] == job.train


def test_a_resolved_grid_lists_its_runs_and_reads_back_equal(tmp_path):
    job = loaded(tmp_path, SMALL | {"train": {"seed": [0, 1], "auxiliary": {"weight": [0.125, 0.5]}}})
    (tmp_path / "resolved.yaml").write_text(job.to_yaml())
    again = load_recipe(str(tmp_path / "resolved.yaml"))
    assert again == job and len(again.saes) == 4
    assert [sae.id.rpartition("raw_")[2] for sae in again.saes] == [
        "auxiliary.weight-0.125_seed-0", "auxiliary.weight-0.125_seed-1", "auxiliary.weight-0.5_seed-0",
        "auxiliary.weight-0.5_seed-1"]
    assert [again.run_hash(sae) for sae in again.saes] == [job.run_hash(sae) for sae in job.saes]


def test_the_command_line_spans_one_too(tmp_path):
    job = loaded(tmp_path, SMALL, overrides=["saes.0.train.seed=[0,1,2]"])
    assert [sae.id for sae in job.saes] == [f"layer_01/width_512/topk_8_raw_seed-{seed}" for seed in range(3)]


def test_another_value_renames_nothing(tmp_path):
    one, three = (loaded(tmp_path, SMALL | {"train": {"seed": seeds}}) for seeds in ([0], [0, 1, 2]))
    assert one.saes[0].id == three.saes[0].id


def test_a_name_stands_before_all_that_varies(tmp_path):
    job = loaded(tmp_path, SMALL | {"name": "mine", "layer": [1, 7], "train": {"lr": [1e-3]}},
                 SMALL | {"name": "plain/one.a"})
    assert [sae.id for sae in job.saes] == ["mine_layer-1_lr-1e-3", "mine_layer-7_lr-1e-3", "plain/one.a"]


def test_sites_vary_and_several_that_are_read_are_one_crosscoder(tmp_path):
    job = loaded(tmp_path, {"site": ["layers.1", "layers.7"], "d_sae": 512, "k": 8},
                 {"reads": ["layers.1", "layers.7"], "d_sae": 512, "k": 8, "train": {"seed": [1]}})
    assert [sae.id for sae in job.saes] == ["layer_01/width_512/topk_8_raw", "layer_07/width_512/topk_8_raw",
                                            "layers_01-07/width_512/topk_8_raw_seed-1"]


def test_what_is_a_list_by_nature_is_no_grid(tmp_path):
    job = loaded(tmp_path, SMALL | {"matryoshka": [0.25, 0.5], "train": {"betas": [0.9, 0.99]}})
    assert len(job.saes) == 1 and job.train_of(job.saes[0]).betas == (0.9, 0.99)
    job = loaded(tmp_path, SMALL | {"matryoshka": [[0.25], [0.25, 0.5]],
                                    "train": {"auxiliary": [None, {"weight": 0.1}], "betas": [[0.9, 0.99]]}})
    assert [sae.id.rpartition("raw_")[2] for sae in job.saes] == [
        "matryoshka-0.25_auxiliary-none_betas-0.9-0.99", "matryoshka-0.25_auxiliary-weight-0.1_betas-0.9-0.99",
        "matryoshka-0.25-0.5_auxiliary-none_betas-0.9-0.99",
        "matryoshka-0.25-0.5_auxiliary-weight-0.1_betas-0.9-0.99"]
    assert job.train_of(job.saes[0]).auxiliary is None and job.train_of(job.saes[1]).auxiliary.weight == 0.1


def test_every_key_that_holds_a_list_is_known():
    def holds_a_list(annotation):
        return typing.get_origin(annotation) in (list, tuple) or any(
            holds_a_list(inner) for inner in typing.get_args(annotation))

    assert {name for model in (CoderConfig, Train) for name, field in model.model_fields.items()
            if name != "train" and holds_a_list(field.annotation)} == set(LISTS)


@pytest.mark.parametrize(("value", "text"), [
    (1e-3, "1e-3"), (3e-4, "3e-4"), (0.5, "0.5"), (0.01, "0.01"), (0.0015, "0.0015"), (1e6, "1e6"), (1.0, "1"),
    (2.5e-5, "2.5e-5"), (0.1, "0.1"), (0.30000000000000004, "0.30000000000000004"), (12345678, "12345678"),
    (True, "true"), (None, "none"), ("layer_norm", "layer_norm"), ("a/b c", "a-b-c"), ({"every": 5}, "every-5")])
def test_values_in_names(value, text):
    assert plain_text(value) == text


@pytest.mark.parametrize(("saes", "message"), [
    ([SMALL | {"train": {"lr": []}}], r"saes.0.train.lr: an empty list gives no run"),
    ([SMALL | {"k": []}], r"saes.0.k: an empty list gives no run"),
    ([SMALL | {"train": {"seed": [0, 1, 0]}}], r"saes.0.train.seed: 0 appears twice"),
    ([SMALL | {"train": {"tokens": {"count": 5}}}], r"saes.0.train.tokens: decides the store"),
    ([SMALL | {"train": {"chunk_lengths": [[1, 2]]}}], r"saes.0.train.chunk_lengths: decides the store"),
    ([SMALL | {"model": {"name": "x"}}], r"saes.0: model decides the store"),
    ([SMALL | {"seed": 1}], r"saes.0: seed decides the store.*the seed of training is train: \{seed: ...\}"),
    ([SMALL | {"lr": 1}], r"saes.0: lr is a key of train: write train: \{lr: ...\}"),
    ([SMALL, SMALL | {"name": "x", "train": {"learning_rate": 1}}], r"saes.1.train.learning_rate: unknown key"),
    ([SMALL | {"train": {"auxiliary": {"wait": 1}}}], r"saes.0.train.auxiliary.wait: unknown key"),
    ([SMALL | {"train": {"lr": [1e-3, "fast"]}}], r"saes.0.train.lr: .*number.*'fast'"),
    ([SMALL | {"train": {"seed": [0, 1]}}, SMALL | {"layer": 9}], r"saes.1: layers.9 is not collected"),
    ([SMALL | {"k": 600, "train": {"seed": [0, 1]}}], r"saes.0: k \(600\) is over d_sae"),
    ([SMALL | {"train": {"decoder_rate": 2}}], r"saes.0.train.decoder_rate: tied weights have one rate"),
    ([SMALL | {"activation": "groupmax", "train": {"candidates": {}}}], r"saes.0.activation: groupmax needs all"),
    ([SMALL | {"train": {"checkpoints": "some"}}], r"saes.0.train.checkpoints: must be last, all, or \{every: STEPS\}"),
    ([SMALL | {"train": {"seed": -1}}], r"saes.0.train.seed: .*greater than or equal to 0"),
    ([SMALL | {"train": 5}], r"saes.0.train: .*dictionary"),
    ([SMALL | {"name": "a"}, SMALL | {"name": "a", "k": 4}], r"saes: a appears twice; give one of the two"),
    ([SMALL | {"name": "a"}, SMALL | {"name": "A", "k": 4}], r"a and A are one folder if case does not count"),
    ([SMALL | {"name": "a"}, SMALL | {"name": "a/b", "k": 4}], r"run a/b would be inside the folder of run a"),
    ([SMALL | {"name": "../a"}], r"saes.0.name: a name has only letters, digits"),
    ([SMALL | {"name": ""}], r"saes.0.name: a name has only letters, digits"),
    ([SMALL | {"name": ".hidden"}], r"saes.0.name: a name has only letters, digits"),
])
def test_every_mistake_is_one_line_that_names_the_entry(tmp_path, saes, message):
    with pytest.raises(UserError, match=message) as raised:
        loaded(tmp_path, *saes)
    assert "\n" not in str(raised.value)


def test_a_list_at_the_top_is_refused_with_the_way_to_say_it(tmp_path):
    with pytest.raises(UserError, match=r"train.seed: a list spans a grid .* only under an SAE: use saes.N.train.seed"):
        loaded(tmp_path, SMALL, overrides=["train.seed=[0,1]"])
