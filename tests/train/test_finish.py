"""The end of a run on the language model's own loss: its gradient, the tokens that it reads, its effect."""

import json

import pytest
import torch

from helpers import recipe, small_model, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.model.splice import load_causal_lm
from olmoscope.recipe.schema import Model, Recipe
from olmoscope.site import Site
from olmoscope.tokens.segments import read_token_segment
from olmoscope.train.finish import ModelLoss, SequenceReader, draw_steps
from olmoscope.train.group import train_from_store
from olmoscope.train.run import run_folder

SITES = ["layers.1", "layers.2.mlp.in", "layers.2.mlp.out", "layers.5"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A recipe whose store is collected, and that store."""
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=300)
    job = recipe(folder / "corpus", tokens__count=24000, activations={"sites": SITES},
                 train={"batch": 128, "dead_window": 1000, "auxiliary": {"dead_window": 5000}},
                 saes=[{"site": "layers.5", "d_sae": 256, "k": 8, "weights": "untied"}])
    collect(job, "train", folder / "store")
    return job, open_store(folder / "store")


def loss_on(store, *sites: str) -> ModelLoss:
    """The loss at the last of these sites."""
    model = load_causal_lm(Model(name="tiny", dtype="float32"), CPU)
    wanted = [Site.parse(site) for site in sites]
    return ModelLoss(SequenceReader(lambda: model, wanted, store.path, apart=False), wanted[-1], kl=2.0)


def test_steps_read_the_rows_wanted_and_no_sequence_twice_before_all_were_read(job):
    _, store = job
    steps = draw_steps(store.path, 23, 512, seed=1)
    assert len(steps) == 23
    assert all(draw_steps(store.path, 23, 16, seed=1))  # one sequence per step, if one is longer than a batch
    assert 23 * 512 <= sum(piece.rows for step in steps for piece in step) < 24 * 512
    read = [(piece.segment, sequence) for step in steps for piece in step
            for sequence in range(piece.first, piece.last)]
    assert len(set(read)) == len(read)
    assert steps == draw_steps(store.path, 23, 512, seed=1) != draw_steps(store.path, 23, 512, seed=2)


def test_several_ranks_can_share_a_step(job):
    _, store = job
    whole, parts = (draw_steps(store.path, 10, 512, seed=1, parts=parts) for parts in (1, 4))
    assert sum(len(step) for step in parts) > sum(len(step) for step in whole)
    assert all(piece.rows <= 128 or piece.last == piece.first + 1 for step in parts for piece in step)
    assert 10 * 512 <= sum(piece.rows for step in parts for piece in step) < 11 * 512


@pytest.mark.parametrize("site", SITES)
def test_the_pull_is_the_gradient_of_the_divergence(job, site):
    """Equal to the whole model in one graph, with the test's own hook and with padding."""
    _, store = job
    loss = loss_on(store, site)
    (step,) = draw_steps(store.path, 1, 300, seed=0)
    read = loss.reader.read(step)
    assert loss.reader.read(step) is read  # by all runs of a group
    x_BD = read.rows[Site.parse(site)]
    torch.manual_seed(0)
    y_BD = x_BD - 0.3  # the target of the trained latents: the rest stays in the row
    xhat_BD = y_BD + 0.1 * x_BD.norm(dim=1, keepdim=True) * torch.randn_like(x_BD) / x_BD.shape[1] ** 0.5
    e_BD = torch.randn_like(x_BD)
    before_BD = torch.randn(7, x_BD.shape[1])  # rows of the stream, which the model does not read
    pulled_BD = loss.pull(read, *(torch.cat([before_BD, rows_BD]) for rows_BD in (xhat_BD, y_BD, e_BD)))
    assert not pulled_BD[:7].any()
    found_BD = pulled_BD[7:]

    module = loss.reader.model.module
    layer = module.model.layers[Site.parse(site).layer]
    spliced_BD = (xhat_BD + 0.3).requires_grad_()
    total, done = torch.zeros(()), 0
    for piece in step:
        tokens = read_token_segment(store.path, piece.segment)
        for sequence in range(piece.first, piece.last):
            start, stop = tokens.sequence_starts[sequence : sequence + 2]
            ids_1T = torch.from_numpy(tokens.token_ids[start:stop].astype("int64"))[None]
            rows_1TD = spliced_BD[done : done + stop - start][None]
            done += stop - start
            clean = module(input_ids=ids_1T).logits.detach()
            if site.endswith("mlp.in"):
                hook = layer.mlp.register_forward_pre_hook(lambda *_, rows=rows_1TD: (rows,))
            elif site.endswith("mlp.out"):
                hook = layer.post_feedforward_layernorm.register_forward_hook(lambda *_, rows=rows_1TD: rows)
            else:
                hook = layer.register_forward_hook(lambda *_, rows=rows_1TD: rows)
            logits = module(input_ids=ids_1T).logits
            hook.remove()
            total = total + torch.nn.functional.kl_div(logits.log_softmax(-1), clean.log_softmax(-1), log_target=True,
                                                       reduction="sum")
    assert done == len(x_BD)
    (g_BD,) = torch.autograd.grad(total, spliced_BD)
    torch.testing.assert_close(found_BD, 2 * g_BD * e_BD.norm() / g_BD.norm(), rtol=1e-3, atol=1e-3 * float(
        found_BD.abs().max()))


def figures(job: Recipe, store, out):
    assert [fresh for _, fresh in train_from_store(job, job.saes, store, out)] == [True]
    return json.loads((run_folder(out, job.saes[0]) / "done.json").read_text())


@pytest.mark.parametrize("sae", [
    {"site": "layers.5"}, {"reads": "layers.2.mlp.in", "writes": "layers.2.mlp.out", "skip": True},
    {"site": "layers.5", "normalize": "layer_norm", "matryoshka": [0.25]}])
def test_the_model_is_harmed_less(job, tmp_path, sae):
    """Divergence on training sequences, spliced, with and without the model's loss in the last half of the steps."""
    base, store = job
    sae = {"d_sae": 256, "k": 8, "weights": "untied"} | sae
    divergence, steps = {}, {}
    for name, train in (("plain", {}), ("finished", {"finish": {"share": 0.5}})):
        made = Recipe.model_validate(base.model_dump() | {"saes": [sae | {"train": train}]})
        done = figures(made, store, tmp_path / name)
        steps[name] = (done["steps"], done["tokens"])
        divergence[name] = _divergence(made, store, tmp_path / name)
        log = (run_folder(tmp_path / name, made.saes[0]) / "training.log").read_text()
        assert (f"the last {round(0.5 * done['steps']):,} of {done['steps']:,} steps also run the language model" in log
                ) == (name == "finished")
    assert steps["finished"][0] == steps["plain"][0]
    assert steps["finished"][1] == pytest.approx(1.5 * steps["plain"][1], rel=0.02)
    assert divergence["finished"] < 0.97 * divergence["plain"], divergence


def _divergence(job: Recipe, store, out) -> float:
    from olmoscope.sae.io.open import open_sae

    coder = open_sae(run_folder(out, job.saes[0])).sae
    (writes,), (reads,) = job.saes[0].writes or job.saes[0].reads, job.saes[0].reads
    loss = loss_on(store, str(reads), str(writes))
    total = count = 0.0
    for step in draw_steps(store.path, 6, 500, seed=5):
        read = loss.reader.read(step)
        parts = read.rows[reads].split([len(one.real_R) for one, _ in read.passes])
        for (batch, reading), part in zip(read.passes, parts, strict=True):
            spliced = reading.at[writes].flatten(0, 1).clone()
            spliced[batch.real_R] = coder.reconstruct(part)[0].detach()
            hidden = loss.reader.model.go_on(loss.reader.places[writes], spliced.view_as(reading.at[writes]), reading)
            p, q = (loss.reader.model.logits(one.flatten(0, 1)[batch.real_R]).log_softmax(-1)
                    for one in (reading.hidden_BTD, hidden))
            total += float((p.exp() * (p - q)).sum())
            count += len(part)
    return total / count


def test_what_cannot_be_finished_is_refused(job):
    base, _ = job

    def refused(**changes):
        with pytest.raises(ValueError, match="finish") as error:
            Recipe.model_validate(base.model_dump() | changes)
        return str(error.value)

    assert "leave out one of finish and filter" in refused(
        train={"finish": {}, "filter": {"first_positions": 1}})
    assert "finish is for coders that write one site" in refused(
        train={"finish": {}}, saes=[{"reads": ["layers.1", "layers.5"], "d_sae": 64, "k": 4}])
    assert "less than 1" in refused(train={"finish": {"share": 1.0}})


def test_a_run_without_it_is_what_it_was(job):
    """The key affects the identity only if it is set, so hashes of older runs stay the same."""
    base, _ = job
    finished = Recipe.model_validate(base.model_dump() | {"train": base.train.model_dump() | {"finish": {"kl": 1.0}}})
    assert "finish" not in base.run_identity(base.saes[0])["train"]
    assert base.run_hash(base.saes[0]) != finished.run_hash(finished.saes[0])


def test_small_model_of_another_architecture(tmp_path):
    """GPT-2, whose layers do not output plain tensors, and whose positions are learned."""
    small_model("GPT2").save_pretrained(tmp_path / "model")
    model = load_causal_lm(Model(name=str(tmp_path / "model"), dtype="float32"), CPU)
    place = model.find([Site(1)]).places[Site(1)]
    ids = torch.arange(10)[None]
    reading = model.read(ids, None, [place])
    x = reading.at[Site(1)].clone().requires_grad_()
    assert torch.equal(model.go_on(place, x, reading), reading.hidden_BTD)
    (gradient,) = torch.autograd.grad(model.go_on(place, x, reading).square().sum(), x)
    assert gradient.abs().min() > 0
