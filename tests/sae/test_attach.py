"""Coders in a running model: what they read and write, the gradients, and what is refused."""

import dataclasses
from importlib import resources

import pytest
import torch
from transformers import AutoModelForCausalLM

import olmoscope
from coders import coder_of, parameters
from helpers import ARCHITECTURES, small_model
from olmoscope.errors import UserError
from olmoscope.model.splice import load_causal_lm
from olmoscope.recipe.schema import Model
from olmoscope.sae.coder import SparseCoder
from olmoscope.site import Site

TINY = str(resources.files("olmoscope") / "model" / "tiny")
WIDTH, LATENTS = 32, 64
INNER = ("layers.1.mid", "layers.1.mlp.out", "layers.2.attn.out", "layers.2.mlp.in", "layers.2.attn.z", "embed")


def coder_at(reads: str, writes: str | None = None, *, width: int = WIDTH, kind: str = "topk", normalize: str = "none",
             dtype: torch.dtype = torch.float32, seed: int = 0) -> SparseCoder:
    """A small random coder of a site; a transcoder if it writes another."""
    ends = "same" if writes is None else "other"
    state = parameters(kind, width, width, LATENTS, seed=seed, ends=ends, dtype=dtype)
    coder = coder_of(kind, {name: tensor * 0.3 for name, tensor in state.items()}, normalize, ends)
    return coder.at([reads], None if writes is None else [writes])


def logits(model: torch.nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens_BT, use_cache=False).logits


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def tokens_BT():
    return torch.randint(2, 4000, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama():
    return small_model("Llama")


@pytest.mark.parametrize("site", ["layers.0", "layers.3", *INNER])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_changes_nothing_and_keeping_the_error_changes_no_logit(architecture, site, tokens_BT):
    model = small_model(architecture).train()  # dropout is at work, and none of the passes that look for sites may draw
    coder = coder_at(site)
    torch.manual_seed(0)
    plain = logits(model, tokens_BT)
    with olmoscope.attach(model, coder) as taps:
        torch.manual_seed(0)
        assert torch.equal(logits(model, tokens_BT), plain)
    codes = coder.encode(taps[site])
    assert torch.equal(taps.codes.values, codes.values) and torch.equal(taps.codes.indices, codes.indices)
    assert list(taps) == [Site.parse(site)] and taps[site].shape == (2, 12, WIDTH)
    torch.testing.assert_close(taps.reconstructions[site] + taps.errors[site], taps[site])
    with olmoscope.attach(model, coder, mode="replace_keep_error"):
        torch.manual_seed(0)
        torch.testing.assert_close(logits(model, tokens_BT), plain, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.manual_seed(0)
            torch.testing.assert_close(logits(model, tokens_BT), plain, rtol=1e-5, atol=1e-5)
    with olmoscope.attach(model, coder, mode="replace"):
        torch.manual_seed(0)
        assert (logits(model, tokens_BT) - plain).abs().max() > 1e-2
    assert hooks(model) == 0 and all(module.training for module in model.modules())


@pytest.mark.parametrize("layer", [0, 3])
def test_keeping_the_error_at_a_layers_output_keeps_every_bit(llama, layer, tokens_BT):
    with olmoscope.attach(llama, coder_at(f"layers.{layer}", normalize="layer_norm"), mode="replace_keep_error"):
        found = logits(llama, tokens_BT)
    assert torch.equal(found, logits(llama, tokens_BT))


@pytest.mark.parametrize("site", ["layers.3", "layers.7", "layers.3.mlp.out", "layers.3.mid"])
def test_replacing_is_what_evaluation_does(site, tokens_BT):
    model = load_causal_lm(Model(name="tiny", dtype="float32"), torch.device("cpu"))
    tokens_BT = tokens_BT % 2000
    coder = coder_at(site, width=256)
    place = model.find([Site.parse(site)]).places[Site.parse(site)]
    reading = model.read(tokens_BT, None, [place])
    put_BTD, _ = coder.reconstruct(reading.at[place.site])
    wanted = model.logits(model.go_on(place, put_BTD, reading).flatten(0, 1))
    with torch.no_grad(), olmoscope.attach(model.module, coder, mode="replace") as taps:
        found = logits(model.module, tokens_BT).flatten(0, 1)
    torch.testing.assert_close(taps[site], reading.at[place.site])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize(("reads", "writes"), [
    ("layers.1", None), ("layers.1.mlp.out", None), ("layers.1.mid", None), ("layers.1.mlp.in", "layers.1.mlp.out")])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_codes_and_errors_equal_finite_differences(kind, reads, writes, frozen, tokens_BT):
    model = small_model("GPT2").double().requires_grad_(not frozen)  # Llama's norms compute in float32 nevertheless
    coder = coder_at(reads, writes, kind=kind, dtype=torch.float64)
    goal = torch.randn(4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with olmoscope.attach(model, coder, mode="replace_keep_error") as taps:
        (logits(model, tokens_BT)[:, -1] @ goal).sum().backward()
    codes, site = taps.codes, writes or reads
    assert codes.values.grad is not None and codes.values.grad.shape == codes.values.shape
    error_BTD, x_BTD = taps.errors[site], taps[site].detach()
    layer = model.transformer.h[1]
    assert hooks(model) == 0

    def outcome(values: torch.Tensor, error: torch.Tensor) -> float:
        """The goal with other codes and another error at the site, put there by the test's own hook."""
        put = coder.decode(dataclasses.replace(codes, values=values)) + error
        if reads == "layers.1":
            handle = layer.register_forward_hook(lambda *_: put)
        elif site == "layers.1.mlp.out":
            handle = layer.mlp.register_forward_hook(lambda *_: put)
        else:  # the stream between attention and MLP is what attention adds, on top of the layer's input
            handle = layer.attn.register_forward_hook(
                lambda module, inputs, output: (output[0] + (put - x_BTD), *output[1:]))
        with torch.no_grad():
            found = float((logits(model, tokens_BT)[:, -1] @ goal).sum())
        handle.remove()
        return found

    values, error = codes.values.detach(), error_BTD.detach()
    step = 1e-5  # a smaller one would show the rounding of the goal
    for place in ((0, 2, 0), (1, 11, 0), (1, 5, 1)):
        moved = torch.zeros_like(values)
        moved[place] = step
        slope = (outcome(values + moved, error) - outcome(values - moved, error)) / (2 * step)
        assert slope == pytest.approx(float(codes.values.grad[place]), rel=1e-5, abs=1e-7)
    moved = torch.zeros_like(error)
    moved[1, 7, 3] = step
    slope = (outcome(values, error + moved) - outcome(values, error - moved)) / (2 * step)
    assert slope == pytest.approx(float(error_BTD.grad[1, 7, 3]), rel=1e-5, abs=1e-7)


def test_what_is_below_gets_gradients_through_the_codes_alone(tokens_BT):
    model = small_model("Llama")
    coder = coder_at("layers.2")
    dead = dataclasses.replace(coder, b_latent=coder.b_latent - 1e6)  # no latent is active: only the error is there
    for one, reached in ((coder, True), (dead, False)):
        model.zero_grad()
        with olmoscope.attach(model, one, mode="replace_keep_error") as taps:
            logits(model, tokens_BT).logsumexp(-1).sum().backward()
        below, above = model.model.layers[1].mlp.up_proj.weight.grad, model.model.layers[3].mlp.up_proj.weight.grad
        assert bool(below.any()) is reached and above.any() and taps.codes.l0().any() == reached


def test_reading_lets_gradients_pass_to_codes(llama, tokens_BT):
    with olmoscope.attach(llama, coder_at("layers.1")) as taps:
        logits(llama, tokens_BT)
    taps.codes.values.sum().backward()
    assert torch.equal(taps.codes.values.grad, torch.ones_like(taps.codes.values))
    assert llama.model.layers[0].mlp.up_proj.weight.grad.any()


def test_several_coders_see_what_those_below_put_there(llama, tokens_BT):
    low, high = coder_at("layers.0"), coder_at("layers.2", seed=1)
    with torch.no_grad():
        with olmoscope.attach(llama, [low, high], mode="replace") as both:
            found = logits(llama, tokens_BT)
        with olmoscope.attach(llama, high, mode="replace") as inner, olmoscope.attach(llama, low, mode="replace"):
            assert torch.equal(logits(llama, tokens_BT), found)
        with olmoscope.attach(llama, high) as plain:
            logits(llama, tokens_BT)
    assert torch.equal(both.codes_of(high).values, inner.codes.values)
    assert not torch.equal(both["layers.2"], plain["layers.2"])
    with pytest.raises(UserError, match="several coders"):
        _ = both.codes
    with pytest.raises(UserError, match="not attached"):
        both.codes_of(coder_at("layers.0"))


def test_attached_one_inside_the_other_at_inner_sites(llama, tokens_BT):
    """The search for the sites of the second coder runs the model; the first one ignores that run."""
    with torch.no_grad(), olmoscope.attach(llama, coder_at("layers.1"), mode="replace") as outer:
        wanted = logits(llama, tokens_BT)
        before = outer["layers.1"]
        with olmoscope.attach(llama, coder_at("layers.1.mlp.out")):
            assert outer["layers.1"] is before
            assert torch.equal(logits(llama, tokens_BT), wanted)
        with pytest.raises(UserError, match=r"no layers\.9"), olmoscope.attach(llama, coder_at("layers.9")):
            pass
        assert torch.equal(logits(llama, tokens_BT), wanted)


def test_a_crosscoder_reads_several_sites(llama, tokens_BT):
    state = parameters("topk", 2 * WIDTH, 2 * WIDTH, LATENTS, dtype=torch.float32)
    coder = coder_of("topk", state).at(["layers.1", "layers.2"])
    with torch.no_grad(), olmoscope.attach(llama, coder) as taps:
        logits(llama, tokens_BT)
    rows = torch.cat([taps["layers.1"], taps[2]], dim=-1)
    x_hat, codes = coder.reconstruct(rows)
    assert torch.equal(taps.codes.values, codes.values)
    torch.testing.assert_close(torch.cat([taps.errors[1], taps.errors[2]], dim=-1), rows - x_hat)
    with pytest.raises(UserError, match=r"must read layers\.2 before it can write layers\.1"), \
            olmoscope.attach(llama, coder, mode="replace"):
        pass


def test_a_transcoder_reads_one_site_and_replaces_another(llama, tokens_BT):
    coder = coder_at("layers.1.mlp.in", "layers.1.mlp.out")
    with torch.no_grad(), olmoscope.attach(llama, coder, mode="replace") as taps:
        found = logits(llama, tokens_BT)
    handle = llama.model.layers[1].mlp.register_forward_hook(lambda m, inputs, output: coder.reconstruct(inputs[0])[0])
    wanted = logits(llama, tokens_BT)
    handle.remove()
    assert torch.equal(found, wanted)
    mlp = llama.model.layers[1].mlp
    torch.testing.assert_close(taps["layers.1.mlp.out"], mlp(taps["layers.1.mlp.in"]))
    torch.testing.assert_close(taps.errors["layers.1.mlp.out"],
                               taps["layers.1.mlp.out"] - coder.reconstruct(taps["layers.1.mlp.in"])[0])


def test_hooks_are_gone_whatever_happens(tokens_BT):
    model = small_model("Llama")
    with pytest.raises(ZeroDivisionError), olmoscope.attach(model, coder_at("layers.1"), mode="replace"):
        raise ZeroDivisionError
    broken = coder_at("layers.1")
    with pytest.raises(AttributeError), olmoscope.attach(model, [coder_at("layers.0.mid"), broken], mode="replace"):
        broken.b_latent = None
        logits(model, tokens_BT)
    assert hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_another_dtype(dtype, tokens_BT):
    model = small_model("Llama").to(dtype)
    coder = coder_at("layers.1")
    plain = logits(model, tokens_BT)
    for mode in ("read", "replace_keep_error"):
        with olmoscope.attach(model, coder, mode=mode) as taps:
            assert torch.equal(logits(model, tokens_BT), plain)
        assert taps["layers.1"].dtype == dtype and taps.codes.values.dtype == torch.float32
    with olmoscope.attach(model, coder, mode="replace"):
        assert logits(model, tokens_BT).dtype == dtype


def test_a_decoder_without_its_head(llama, tokens_BT):
    with torch.no_grad(), olmoscope.attach(llama, coder_at("layers.1.mid")) as whole:
        logits(llama, tokens_BT)
    with torch.no_grad(), olmoscope.attach(llama.model, coder_at("layers.1.mid")) as bare:
        llama.model(input_ids=tokens_BT)
    assert torch.equal(bare["layers.1.mid"], whole["layers.1.mid"])


@pytest.mark.parametrize("mode", ["read", "replace_keep_error", "replace"])
def test_generating_with_a_cache(mode):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    coder = coder_at("layers.3", width=256)
    tokens_1T = torch.tensor([[40, 41, 42, 43]])
    settings = {"max_new_tokens": 6, "do_sample": False}
    with olmoscope.attach(model, coder, mode=mode) as taps:
        found = model.generate(tokens_1T, **settings)
        assert taps["layers.3"].shape == (1, 1, 256)  # the last token, alone in its pass
        logits(model, found[:, :-1])
    if mode != "replace":
        assert torch.equal(found, model.generate(tokens_1T, **settings))
    else:
        with torch.no_grad(), olmoscope.attach(model, coder, mode=mode):
            assert int(logits(model, found[:, :-1])[0, -1].argmax()) == int(found[0, -1])


@pytest.mark.parametrize(("make", "line"), [
    (lambda: dataclasses.replace(coder_at("layers.1"), reads=(), writes=()), "does not know which site"),
    (lambda: coder_at("layers.4"), "has 4 layers, so there is no layers.4"),
    (lambda: coder_at("layers.1", width=16), "reads rows of width 16, but layers.1 of LlamaForCausalLM has 32"),
    (lambda: coder_at("layers.1.mlp.in", width=16), "of width 16"),
    (lambda: coder_at("layers.1").to("meta"), "is on cpu, but the coder is on meta"),
    (lambda: [coder_at("layers.1"), coder_at("layers.1", seed=1)], "two coders write layers.1"),
    (lambda: [], "no coder"), (lambda: ["runs/x"], "olmoscope.load")])
@pytest.mark.parametrize("mode", ["read", "replace"])
def test_mistakes_are_one_line(llama, make, line, mode):
    with pytest.raises(UserError, match=line) as caught, olmoscope.attach(llama, make(), mode=mode):
        pass
    assert "\n" not in str(caught.value) and hooks(llama) == 0


def test_other_mistakes_are_one_line(llama, tokens_BT):
    with pytest.raises(UserError, match="replace_keep_error"), olmoscope.attach(llama, coder_at("layers.1"), "splice"):
        pass
    with pytest.raises(UserError, match="causal LM"), olmoscope.attach(torch.nn.Linear(2, 2), coder_at("layers.1")):
        pass
    with olmoscope.attach(llama, coder_at("layers.1")) as taps:
        for ask in (lambda: taps["layers.1"], lambda: taps.codes, lambda: taps.errors["layers.1"]):
            with pytest.raises(UserError, match=r"^no forward pass has reached layers\.1 yet"):
                ask()
        logits(llama, tokens_BT)
    with pytest.raises(UserError, match=r"^nothing is kept for layers\.2, only for layers\.1$"):
        _ = taps["layers.2"]
    assert "layers.1" in taps and 1 in taps and Site(2) not in taps and len(taps) == 1
