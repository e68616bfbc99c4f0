"""Training with candidates from an 8-bit product: the same SAE on ordinary rows; the margin widens if necessary."""

import json

import pytest
import torch
from torch import Tensor

from helpers import checkpoint_contents, recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.files import read_json
from olmoscope.recipe.schema import Candidates
from olmoscope.train import candidates as module
from olmoscope.train.adam import Adam
from olmoscope.train.candidate_trial import TRIAL_STEPS, Trial, Verdict
from olmoscope.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from olmoscope.train.group import train_from_store
from olmoscope.train.initialize import initialize
from olmoscope.train.run import Run, run_folder
from olmoscope.train.step import Step

ADAM = Adam((0.9, 0.999), 1e-8)
ROWS, D_MODEL, LATENTS, K = 256, 32, 256, 8


def rows(seed: int, huge: float) -> Tensor:
    """Rows with one huge channel that carries no information: its sign is random."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(ROWS, D_MODEL, generator=generator)
    x_BD[:, 0] *= huge
    return x_BD


def steps_on(huge: float, count: int, step: Step, first: int = 0) -> list[str]:
    """Train; returns the messages."""
    said = []
    for number in range(first, count):
        step(rows(number, huge), 1e-3)
        if step.candidates and (warning := step.candidates.judge(step.count)):
            said.append(warning)
    return said


def fresh(candidates: Candidates | None, tied: bool = True) -> Step:
    sae = initialize(D_MODEL, LATENTS, K, "none", torch.zeros(D_MODEL), seed=0, tied=tied)
    sae.W_enc[:, 0] *= 1e-4  # so that the huge channel does not decide alone
    return Step(sae, ADAM, candidates=candidates)


@pytest.mark.parametrize("tied", [True, False])
def test_on_ordinary_rows_it_trains_as_the_exact_product_does(tied):
    exact, rough = fresh(None, tied), fresh(Candidates(margin=32), tied)  # more than any product needs here
    # With more steps, the last bits of different processors' products decide which latent is at the k-th place.
    assert steps_on(1.0, 70, exact) == [] == steps_on(1.0, 70, rough)
    for name, exactly in exact.sae.state_dict().items():
        torch.testing.assert_close(rough.sae.state_dict()[name], exactly, rtol=1e-3, atol=1e-3, msg=name)
    assert rough.take_sums().loss == pytest.approx(exact.take_sums().loss, rel=1e-4)
    checked = rough.candidates.counts[0]
    assert checked > 4 * module.CHECKED_ROWS * K * 0.9 and rough.candidates.take_found() == 1.0
    assert rough.candidates.take_found() is None and rough.candidates.margin == 32


def test_what_it_misses_is_counted_and_widens_the_margin(monkeypatch):
    monkeypatch.setattr(module, "JUDGED_AS", 100)
    step = fresh(Candidates(margin=0))
    said = steps_on(1000.0, 2 * module.JUDGE_STEPS, step)
    assert said[0].startswith("warning: at step 64 the 8-bit candidates (k + 0) missed ") and "k + 8" in said[0]
    assert step.candidates.margin == (16 if len(said) == 2 else 8)
    assert step.candidates.take_found() < 1


def test_at_the_widest_margin_the_exact_product_takes_over(monkeypatch):
    monkeypatch.setattr(module, "JUDGED_AS", 1)
    monkeypatch.setattr(module, "MOST_MARGIN", 4)
    step = fresh(Candidates(margin=0))
    said = steps_on(1000.0, module.JUDGE_STEPS, step)
    assert len(said) == 1 and "exact product" in said[0] and step.candidates.margin == module.EXACT
    x_BD = rows(0, 1.0)
    got = step.candidates.encode(x_BD, step.sae.b_latent, K, step.count)
    want = step.kernels.encode_topk(x_BD, step.sae.W_enc, step.sae.b_latent, K)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert steps_on(1000.0, 2 * module.JUDGE_STEPS, step, module.JUDGE_STEPS) == []


@pytest.mark.parametrize("stopped_after", [40, 70])
def test_a_checkpoint_holds_the_margin_and_what_was_counted(monkeypatch, tmp_path, stopped_after):
    """Before and after the margin is widened: the same bits as without a stop."""
    monkeypatch.setattr(module, "JUDGED_AS", 100)
    whole, first, second = (fresh(Candidates(margin=0)) for _ in range(3))
    assert steps_on(1000.0, 100, whole)
    steps_on(1000.0, stopped_after, first)
    save_checkpoint(tmp_path / "checkpoint.safetensors", first, {})
    load_checkpoint(tmp_path / "checkpoint.safetensors", second)
    steps_on(1000.0, 100, second, stopped_after)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    assert whole.candidates.margin == second.candidates.margin > 0


def test_a_run_logs_the_share_found_and_warns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "JUDGE_STEPS", 16)
    monkeypatch.setattr(module, "MISSED_AT_MOST", -1.0)
    monkeypatch.setattr(Trial, "verdict", lambda self: Verdict(exact_ms=2.0, candidates_ms=1.0))
    write_documents(tmp_path / "corpus", count=120)
    job = recipe(tmp_path / "corpus", tokens__count=6000, train__candidates={"margin": 24}, train__log_every=10)
    collect(job, "train", tmp_path / "store")
    store = open_store(tmp_path / "store")
    list(train_from_store(job, job.saes[:1], store, tmp_path / "out"))
    run = run_folder(tmp_path / "out", job.saes[0])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["margin"] for line in lines] == [24, 48, 48, 96, 96]
    assert [line["candidates_found"] is None for line in lines] == [False, False, True, False, True]
    assert all(line["candidates_found"] in (None, 1.0) for line in lines)
    warning = ("warning: at step 16 the 8-bit candidates (k + 24) missed 0 of 128 latents of the top k; "
               "from here on, k + 48 candidates are used")
    assert warning in (run / "training.log").read_text()
    assert warning in " ".join(capsys.readouterr().err.split())
    again = tmp_path / "again"
    list(train_from_store(job, job.saes[:1], store, again))
    assert checkpoint_contents(checkpoints(run)[0]) == checkpoint_contents(
        checkpoints(run_folder(again, job.saes[0]))[0])


@pytest.fixture
def small_store(tmp_path):
    write_documents(tmp_path / "corpus", count=120)
    job = recipe(tmp_path / "corpus", tokens__count=6000, train__candidates={}, train__checkpoint_every=3)
    collect(job, "train", tmp_path / "store")
    return job, open_store(tmp_path / "store")


def weights(job, store, out):
    list(train_from_store(job, job.saes[:1], store, out))
    return checkpoint_contents(checkpoints(run_folder(out, job.saes[0]))[0])


@pytest.mark.parametrize("candidates_ms", [1.0, 3.0])
def test_the_faster_way_is_used_and_said(candidates_ms, small_store, tmp_path, monkeypatch, capsys):
    job, store = small_store
    verdict = Verdict(exact_ms=2.0, candidates_ms=candidates_ms)
    monkeypatch.setattr(Trial, "verdict", lambda self: verdict)
    weights(job, store, tmp_path / "out")
    run = run_folder(tmp_path / "out", job.saes[0])
    assert read_json(run / "candidates.json") == {"exact_ms": 2.0, "candidates_ms": candidates_ms}
    margins = {json.loads(line)["margin"] for line in (run / "metrics.jsonl").read_text().splitlines()[3:]}
    assert margins == ({16} if candidates_ms < 2 else {module.EXACT})
    said = f"{candidates_ms:.1f} ms a batch with 8-bit candidates, 2.0 ms by the exact product"
    assert said in " ".join(capsys.readouterr().err.split()) and str(verdict) in (run / "training.log").read_text()
    assert str(verdict).startswith("warning: ") == (candidates_ms > 2)


def test_the_trial_looks_at_the_clock(small_store, tmp_path):
    job, store = small_store
    weights(job, store, tmp_path / "out")
    verdict = read_json(run_folder(tmp_path / "out", job.saes[0]) / "candidates.json")
    assert 0 < verdict["exact_ms"] < 1e4 and 0 < verdict["candidates_ms"] < 1e4


@pytest.mark.parametrize("checkpoint_every", [3, 1000])
@pytest.mark.parametrize("candidates_ms", [1.0, 3.0])
def test_a_run_that_goes_on_keeps_the_verdict(candidates_ms, checkpoint_every, small_store, tmp_path, monkeypatch):
    """Killed after the verdict, with a checkpoint from before it or with none, a run gets the weights of one that was
    never killed, whatever the clock says the second time."""
    job, store = small_store
    job = job.model_copy(update={"train": job.train.model_copy(update={"checkpoint_every": checkpoint_every})})
    monkeypatch.setattr(Trial, "verdict", lambda self: Verdict(exact_ms=2.0, candidates_ms=candidates_ms))
    whole = weights(job, store, tmp_path / "whole")
    run = run_folder(tmp_path / "out", job.saes[0])
    train_on = Run.train_on

    def stop(self, *arguments):
        train_on(self, *arguments)
        if self.step.count == TRIAL_STEPS + 1:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_on", stop)
        with pytest.raises(SystemExit):
            weights(job, store, tmp_path / "out")
    assert (run / "candidates.json").exists() and len(checkpoints(run)) == (checkpoint_every == 3)
    monkeypatch.setattr(Trial, "verdict", lambda self: Verdict(exact_ms=2.0, candidates_ms=4 - candidates_ms))
    assert weights(job, store, tmp_path / "out") == whole
