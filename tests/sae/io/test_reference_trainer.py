"""A checkpoint of the reference trainer can be opened directly, and gives the same SAE as its import."""

import pytest
import torch

from helpers import save_small_model
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.release.import_checkpoint import import_checkpoint
from olmoscope.sae.io.open import find_saes, open_sae
from olmoscope.site import Site
from reference_checkpoint import INPUTS, LATENTS, K, checkpoint


def saved(folder, **changes):
    path = folder / "trained.pt"
    torch.save(checkpoint(**changes), path)
    return path


@pytest.mark.parametrize("normalize", [False, True])
def test_a_file_and_its_import_are_the_same_sae(tmp_path, normalize):
    path = saved(tmp_path, normalize=normalize)
    opened = open_sae(path)
    imported = open_sae(import_checkpoint(path, tmp_path / "sae", model_name="m").folder)
    for name in ("W_enc", "W_dec", "b_latent", "b_in"):
        assert torch.equal(getattr(opened.sae, name), getattr(imported.sae, name))
    assert (opened.sae.k, opened.sae.normalize, opened.site) == (K, imported.sae.normalize, Site(15))
    assert (opened.kind, opened.name, opened.architecture, opened.bos) == ("file", "trained.pt", "topk", "auto")
    assert opened.model_name is None and opened.dtype == torch.float32
    assert opened.metadata == imported.metadata["training"] == {"batch_size": 256, "lr": 3e-4, "mean_loss": 0.3033}
    assert find_saes(str(path)) == [str(path)]
    assert opened.identity == open_sae(str(path)).identity != open_sae(saved(tmp_path, lr=1.0)).identity


def test_the_layer_is_given_where_the_file_does_not_say(tmp_path):
    assert open_sae(saved(tmp_path, layer=None), Site(3)).site == Site(3)
    with pytest.raises(UserError, match="does not say which layer"):
        open_sae(tmp_path / "trained.pt")
    with pytest.raises(UserError, match=r"was trained on layers\.15, not layers\.3"):
        open_sae(saved(tmp_path), Site(3))


def test_other_files_are_refused_in_one_line(tmp_path):
    """Files in no known format, and torch files from other programs."""
    text, other, half = tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt"
    text.write_text("no torch file")
    torch.save({"encoder.weight": torch.zeros(2, 2)}, other)
    half.write_bytes(other.read_bytes()[:-30])
    for path, saying in ((text, "not a file of safetensors, numpy or torch"),
                         (other, r"has an unknown format: it holds encoder.weight; give the folder or file of one SAE; "
                                 r"known formats are a finished run \(done.json\), a checkpoint of a run"),
                         (half, "is damaged")):
        with pytest.raises(UserError, match=saying) as refusal:
            open_sae(path)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="latent_bias holds NaN or inf"):
        open_sae(saved(tmp_path, model={"latent_bias": torch.full((LATENTS,), torch.nan)}))


def test_a_file_is_evaluated_as_its_import_is(tmp_path):
    save_small_model("Llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("A text of some words, and some more of them. " * 20)
    W_FD = torch.nn.functional.normalize(torch.randn(LATENTS, 2 * INPUTS), dim=1)
    path = saved(tmp_path, layer=1, n_inputs=2 * INPUTS,
                 model={"encoder.weight": W_FD, "pre_bias": torch.zeros(2 * INPUTS)})
    folder = import_checkpoint(path, tmp_path / "sae", model_name=str(tmp_path / "model")).folder
    options = Options(tmp_path / "out", str(tmp_path / "text.txt"), 100, str(tmp_path / "model"), "float32", bos=False)
    one, other = (read_evaluation(found.folder / EVALUATION)
                  for found in evaluate_anywhere([str(path), str(folder)], options))
    assert (one.fvu, one.nmse, one.language.kl) == (other.fvu, other.nmse, other.language.kl)
    assert (one.site, one.k, one.sae) == (Site(1), K, "trained.pt")
