"""SAELens itself splices exported SAEs into a model: with the error term, the logits are the model's own. Logits and
gradients also equal those of `olmoscope.attach`.

SAELens' `SAETransformerBridge` (TransformerLens' bridge over the Hugging Face model) takes the package's Olmo 3 model
from its folder. The SAEs are trained for some steps on the model's own activations.
"""

from importlib import resources

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import olmoscope
from olmoscope.model.capture import read_sites, replaced
from olmoscope.model.splice import load_causal_lm
from olmoscope.recipe.schema import Model
from olmoscope.release.validate import validate
from olmoscope.sae.io import saelens
from olmoscope.sae.io.saelens_places import hook_names
from olmoscope.sae.normalize import normalize_rows
from olmoscope.sae.threshold import JumpReLU
from olmoscope.site import Site, SiteModule
from olmoscope.train.adam import Adam
from olmoscope.train.initialize import initialize, initialize_transcoder
from olmoscope.train.step import Step

TINY = str(resources.files("olmoscope") / "model" / "tiny")
MIDDLE, LAST = 3, 7
TEXT = '''def read(path):
    """Read a whole file and return its text."""
    with open(path, encoding="utf-8") as file:
        return file.read()
'''


@pytest.fixture(scope="module")
def tokens():
    return AutoTokenizer.from_pretrained(TINY)(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def bridge():
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    return SAETransformerBridge.boot_transformers(TINY, device="cpu")


@pytest.fixture(scope="module")
def outputs(tokens):
    """What forward hooks see after each layer of the plain Hugging Face model, and its hidden states and logits."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager").eval()
    seen = {}
    for layer in (MIDDLE, LAST):
        model.get_submodule(f"model.layers.{layer}").register_forward_hook(
            lambda module, inputs, output, layer=layer: seen.update(
                {layer: output[0] if isinstance(output, tuple) else output}))
    with torch.no_grad():
        result = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    return seen, result.hidden_states, result.logits


def exported(folder, layer, normalize, x_BD):
    step = Step(initialize(x_BD.shape[1], 512, 8, normalize, normalize_rows(x_BD, normalize)[0].mean(dim=0), seed=0),
                Adam((0.9, 0.999), 1e-8))
    for _ in range(5):
        step(x_BD, lr=1e-3)
    where = hook_names("model.layers", Site(layer))
    saelens.write(step.sae, folder, {"model_name": "tiny", "prepend_bos": False, **where})
    return folder


def test_the_last_hidden_state_is_not_the_last_layers_output(outputs):
    """So the SAE of the last layer must read the hook's rows; the test below shows that in SAELens it does."""
    seen, hidden_states, _ = outputs
    torch.testing.assert_close(hidden_states[MIDDLE + 1], seen[MIDDLE])
    assert (hidden_states[LAST + 1] - seen[LAST]).norm() > 0.1 * seen[LAST].norm()


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("layer", [MIDDLE, LAST])
def test_error_term_identity(bridge, tokens, outputs, tmp_path, layer, normalize):
    from sae_lens import SAE
    seen, _, logits = outputs
    folder = exported(tmp_path / "sae", layer, normalize, seen[layer].flatten(0, 1))
    assert validate(folder, rows={Site(layer): seen[layer].flatten(0, 1)}).passed
    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        base = bridge(tokens)
        spliced = bridge.run_with_saes(tokens, saes=[sae], use_error_term=False)
        identity, cache = bridge.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
        read = cache[bridge.get_sae_hook_name(sae, "hook_sae_input")]
    torch.testing.assert_close(base, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read, seen[layer], rtol=1e-4, atol=1e-4)
    # x̂ + (x − x̂) is x up to rounding; the splice without the term is far from it, so the splice did happen.
    scale = float(base.abs().max())
    assert float((identity - base).abs().max()) < 1e-5 * scale
    assert float((spliced - base).abs().max()) > 1e-2 * scale


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_attach_agrees_with_saelens(bridge, tokens, outputs, tmp_path, normalize):
    from sae_lens import SAE
    seen, _, _ = outputs
    folder = exported(tmp_path / "sae", MIDDLE, normalize, seen[MIDDLE].flatten(0, 1))
    theirs, ours = SAE.load_from_disk(folder), olmoscope.load(folder)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager").eval()
    kept = {}

    def keep(acts, hook):
        acts.retain_grad()
        kept["acts"] = acts
        return acts

    for mode, error_term in (("replace", False), ("replace_keep_error", True)):
        with bridge.saes(saes=[theirs], use_error_term=error_term):
            name = bridge.get_sae_hook_name(theirs, "hook_sae_acts_post")
            wanted = bridge.run_with_hooks(tokens, fwd_hooks=[(name, keep)])
        wanted[0, -1].max().backward()
        with olmoscope.attach(model, ours, mode=mode) as taps:
            found = model(input_ids=tokens, use_cache=False).logits
        found[0, -1].max().backward()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        acts, codes = kept["acts"], taps.codes
        torch.testing.assert_close(codes.to_dense(), acts.to_dense(), rtol=1e-4, atol=1e-4)
        gradient = acts.grad.to_dense().gather(-1, codes.indices)
        active = codes.values > 0
        assert gradient[active].abs().max() > 1e-4
        torch.testing.assert_close(codes.values.grad[active], gradient[active], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_a_transcoder_stands_where_it_writes(bridge, tokens, tmp_path, kind):
    """SAELens reads at one hook and writes at the other: the model continues as with our transcoder in its place."""
    from sae_lens import SAE

    reads, writes = Site(MIDDLE, "mlp.in"), Site(MIDDLE, "mlp.out")
    model = load_causal_lm(Model(name="tiny", dtype="float32"), torch.device("cpu"), [reads, writes])
    places = model.find([reads, writes]).places
    seen = read_sites(model.body, list(places.values()), tokens)
    means = [seen[site].flatten(0, 1).mean(dim=0) for site in (reads, writes)]
    coder = initialize_transcoder(512, 8, *means, 0, "t", skip=False)
    if kind == "jumprelu":
        coder = JumpReLU(coder.W_enc, coder.W_dec, coder.b_in, "none", coder.b_latent, torch.full((512,), 0.5),
                         b_out=coder.b_out, transcoder=True)
    where = hook_names("model.layers", reads, SiteModule(f"model.layers.{MIDDLE}.mlp", "input")) | hook_names(
        "model.layers", writes, SiteModule(f"model.layers.{MIDDLE}.post_feedforward_layernorm", "output"), out=True)
    saelens.write(coder, tmp_path / "sae", {"model_name": "tiny", "prepend_bos": False, **where})
    sae = SAE.load_from_disk(tmp_path / "sae")
    with torch.no_grad():
        base = bridge(tokens)
        spliced = bridge.run_with_saes(tokens, saes=[sae], use_error_term=False)
        identity = bridge.run_with_saes(tokens, saes=[sae], use_error_term=True)
        with replaced(places[writes], lambda x_BTD: coder.reconstruct(seen[reads])[0]):
            ours = model.module(input_ids=tokens, use_cache=False).logits
    scale = float(base.abs().max())
    assert float((identity - base).abs().max()) < 1e-5 * scale
    assert float((spliced - base).abs().max()) > 1e-3 * scale
    torch.testing.assert_close(spliced, ours, rtol=1e-3, atol=1e-4 * scale)
