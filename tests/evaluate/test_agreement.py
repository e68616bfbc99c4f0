"""Figures against the real SAELens' own `run_evals`, on the model in the package and on another architecture.

SAELens runs its bridge over the Hugging Face model, here transformers alone with replaced layer outputs; both in
float32. Its figures are means of float32 values, so they must agree to 1e-4.
"""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import save_small_model, streams
from olmoscope.evaluate.evaluate import Setting, evaluate_on_text
from olmoscope.evaluate.sequences import Sequences
from olmoscope.model.splice import load_causal_lm
from olmoscope.recipe.schema import Model
from olmoscope.sae.io import saelens
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.io.saelens_places import hook_names
from olmoscope.sae.normalize import normalize_rows
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.train.adam import Adam
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step

LENGTH, SEQUENCES, BATCH = 32, 24, 8
TEXT = Path(resources.files("olmoscope").joinpath("files.py")).read_text()


def sequences_of(token_ids):
    """Sequences of equal length, each a document."""
    rows = len(token_ids)
    return Sequences(token_ids, np.arange(0, rows + 1, LENGTH), np.arange(rows) // LENGTH, np.zeros(rows, np.uint8),
                     np.zeros(rows, bool), apart=False)


def made_sae(kind, model, tokens_BT, layer, folder):
    """An SAE of a layer, trained for some steps on these rows (ours), or a random one made by sae-lens."""
    x_RD = model.read(tokens_BT, None, streams(model.layers, [layer])).at[Site(layer)].flatten(0, 1)
    metadata = {"model_name": "m", "prepend_bos": False, "context_size": LENGTH,
                **hook_names("model.layers", Site(layer))}
    if kind in ("none", "layer_norm"):
        mean_D = normalize_rows(x_RD, kind)[0].mean(0)
        step = Step(initialize(x_RD.shape[1], 256, 8, kind, mean_D, seed=0), Adam((0.9, 0.999), 1e-8))
        for _ in range(5):
            step(x_RD, lr=1e-3)
        saelens.write(step.sae, folder, metadata)
        return open_sae(folder)
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(0)
    theirs = JumpReLUSAE(JumpReLUSAEConfig(d_in=x_RD.shape[1], d_sae=256, metadata=SAEMetadata(**metadata)))
    with torch.no_grad():
        theirs.b_dec.copy_(x_RD.mean(0))
        theirs.W_dec /= theirs.W_dec.norm(dim=1, keepdim=True)
        theirs.W_enc.copy_(theirs.W_dec.T)
        theirs.threshold.fill_(float((x_RD - x_RD.mean(0)).norm(dim=1).mean()) * 0.1)
    theirs.save_model(folder)
    return open_sae(folder)


def their_figures(folder, model_folder, token_ids):
    from datasets import Dataset
    from sae_lens import SAE
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    bridge = SAETransformerBridge.boot_transformers(str(model_folder), device="cpu")
    sae = SAE.load_from_disk(folder)
    # What the bridge itself calls a layer's output. Under TransformerLens' older name its hooks silently do not fire.
    sae.cfg.metadata.hook_name = sae.cfg.metadata.hook_name.replace("hook_resid_post", "hook_out")
    store = ActivationsStore.from_sae(bridge, sae, Dataset.from_dict({"tokens": token_ids.reshape(-1, LENGTH)}),
                                      streaming=False, store_batch_size_prompts=BATCH, total_tokens=SEQUENCES)
    config = get_eval_everything_config(BATCH, SEQUENCES // BATCH, SEQUENCES // BATCH)
    return run_evals(sae, store, bridge, ActivationScaler(), config, exclude_special_tokens=False)


@pytest.fixture(scope="module", params=["tiny", "GPT2"])
def model_folder(request, tmp_path_factory):
    if request.param == "tiny":
        return Path(resources.files("olmoscope").joinpath("model", "tiny"))
    return save_small_model(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model_folder):
    """The model, and tokens of real text, few of which are special."""
    spec = Model(name=str(model_folder), dtype="float32", attention="eager")
    token_ids = load_tokenizer(spec).encode([TEXT])[0][: LENGTH * SEQUENCES]
    assert len(token_ids) == LENGTH * SEQUENCES
    return load_causal_lm(spec, torch.device("cpu")), token_ids


@pytest.mark.parametrize("kind", ["none", "layer_norm", "jumprelu"])
def test_agrees_with_saelens_run_evals(model_folder, loaded, kind, tmp_path):
    model, token_ids = loaded
    layer = len(model.layers) - 2
    tokens_BT = torch.from_numpy(token_ids.astype(np.int64)).view(SEQUENCES, LENGTH)
    subject = made_sae(kind, model, tokens_BT, layer, tmp_path / "sae")
    setting = Setting(sequences_of(token_ids), len(token_ids), LENGTH * BATCH, "text", "float32", tmp_path)
    (ours,) = evaluate_on_text([subject], model, setting)
    theirs, features = their_figures(tmp_path / "sae", model_folder, token_ids)
    preserved, behaviour = theirs["model_performance_preservation"], theirs["model_behavior_preservation"]
    quality, shrinkage = theirs["reconstruction_quality"], theirs["shrinkage"]
    language = ours.language
    for name, found, wanted in (
        ("unexplained variance", 1 - ours.explained_variance, 1 - quality["explained_variance"]),
        ("cosine", ours.cosine, quality["cossim"]),
        ("l2 ratio", ours.l2_ratio, shrinkage["l2_ratio"]),
        ("L0", ours.l0.mean, theirs["sparsity"]["l0"]),
        ("L1", ours.l1, theirs["sparsity"]["l1"]),
        ("clean", language.ce_clean, preserved["ce_loss_without_sae"]),
        ("spliced", language.ce_spliced, preserved["ce_loss_with_sae"]),
        ("zero", language.ce_zero, preserved["ce_loss_with_ablation"]),
        ("KL", language.kl, behaviour["kl_div_with_sae"]),
        ("KL zero", language.kl_zero, behaviour["kl_div_with_ablation"]),
    ):
        assert found == pytest.approx(wanted, rel=1e-4), name
    # A quotient of differences: its error is their error divided by the difference.
    assert language.loss_recovered_zero == pytest.approx(preserved["ce_loss_score"], abs=2e-4)
    density_F = np.array(features["feature_density"])
    assert ours.dead.share == pytest.approx(float((density_F == 0).mean()), abs=1 / 256)
    assert ours.density.over_10_percent == pytest.approx(float((density_F > 0.1).mean()), abs=1 / 256)
    assert (ours.rows, language.rows, language.predictions) == (
        LENGTH * SEQUENCES, LENGTH * SEQUENCES, (LENGTH - 1) * SEQUENCES)
    assert language.kl > 0


def test_batch_sizes_give_equal_figures(loaded, tmp_path):
    """In float32, they differ only by the rounding of products with different shapes."""
    model, token_ids = loaded
    tokens_BT = torch.from_numpy(token_ids.astype(np.int64)).view(SEQUENCES, LENGTH)
    layer = len(model.layers) // 2
    subject = made_sae("none", model, tokens_BT, layer, tmp_path / "sae")
    found = []
    for batch in (1, 7, 4096):  # sequences are 32 long: one at a time, one at a time, all at once
        setting = Setting(sequences_of(token_ids), len(token_ids), batch, "text", "float32", tmp_path / str(batch))
        found += evaluate_on_text([subject], model, setting)
    for other in found[1:]:
        for (name, value), (_, wanted) in zip(flat(other.model_dump()), flat(found[0].model_dump()), strict=True):
            assert value == pytest.approx(wanted, rel=2e-5, abs=1e-6), name


def flat(value, name=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{name}.{place}")
    elif isinstance(value, int | float):
        yield name, value
