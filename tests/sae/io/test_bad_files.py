"""Damaged files, and settings that contradict their tensors, get one line each."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import foreign_files as made
from olmoscope.errors import UserError
from olmoscope.sae.io.headers import read_header, read_tensors
from olmoscope.sae.io.open import look_at, open_sae
from olmoscope.sae.io.torch_file import is_torch_file
from olmoscope.site import Site

FOREIGN = Path(__file__).parents[2] / "foreign"
QWEN, SET = "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_20", "mwhanna/qwen3-4b-transcoders"


def broken(folder, change):
    """A made SAE whose tensors are changed, as a torch file."""
    path = folder / "Goodfire" / made.goodfire(folder, repo="Goodfire")
    tree = torch.load(path, weights_only=True)
    change(tree)
    torch.save(tree, path)
    return path


class Module(torch.nn.Module):
    """A whole module, which cannot be read without its code."""


@pytest.mark.parametrize(("change", "message"), [
    (lambda tree: tree.pop("decoder_linear.bias"), "has an unknown format: it holds decoder_linear.weight, "
                                                   "encoder_linear.bias, encoder_linear.weight; give the "
                                                   "folder or file of one SAE; known formats are"),
    (lambda tree: tree.update({"encoder_linear.bias": torch.zeros(3)}),
     r"encoder_linear.bias is \[3\], and encoder_linear.weight is \[48, 16\]: they do not fit together"),
    (lambda tree: tree.update({"decoder_linear.bias": torch.full((16,), torch.nan)}), "holds NaN or inf"),
    (lambda tree: tree.update({"module": Module()}), "was refused: it is a pickle that would execute code of its own"),
])
def test_bad_files(tmp_path, change, message):
    path = broken(tmp_path, change)
    with pytest.raises(UserError, match=message) as refusal:
        open_sae(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_bad_settings(tmp_path):
    """A config that contradicts its tensors, or has unknown settings."""
    def fails(path, message, **site):
        with pytest.raises(UserError, match=message) as refusal:
            open_sae(path, **site)
        assert "\n" not in str(refusal.value)

    for changes, message in (({"d_sae": 7}, "d_sae is 7, but the tensors have 48"),
                             ({"dataset_average_activation_norm": None}, "must be a positive number, not None"),
                             ({"hook_point_in": "blocks.1.hook_odd"}, "is not a known site")):
        made.llama_scope(tmp_path, **changes)
        fails(tmp_path / "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x", message)
    path = tmp_path / SET / made.circuit_tracer(tmp_path, config={"feature_input_hook": "odd.hook"})
    fails(path, "feature_input_hook 'odd.hook' is not a known site")
    fails(path.rename(path.with_name("renamed.safetensors")), "does not say which site it reads")
    made.circuit_tracer(tmp_path, config={"activation": "topk"})
    fails(path, "k must be a number from 1 to 48, not None")
    clt = tmp_path / "some/clt" / made.clt(tmp_path, repo="some/clt")
    (clt.parent / "W_dec_1.safetensors").unlink()
    fails(clt, "W_dec_1.safetensors is missing: it holds the decoders")
    for name, key, value, message in (
            ("sparsify/topk/layers.3/cfg.json", "k", 0, "k must be a number from 1 to 40, not 0"),
            ("sparsify/topk/layers.3/cfg.json", "d_in", 17, "has d_in 16 and 40 latents; cfg.json says 17 and 40"),
            ("sparsify/topk/layers.3/cfg.json", "signed", True, "signed: latents with negative codes"),
            ("llamascopium/relu/config.json", "sae_type", "lorsa", "sae_type 'lorsa': it is a low-rank"),
            ("llamascopium/relu/config.json", "sae_type", "crosscoder", "sae_type 'crosscoder': it is a crosscoder"),
            ("llamascopium/relu/config.json", "sae_type", "odd", "sae_type 'odd' is not supported; supported is sae"),
            ("llamascopium/relu/config.json", "expansion_factor", 3, "config.json says 16 and 48"),
            ("llamascopium/relu/config.json", "act_fn", "batchtopk", "act_fn 'batchtopk' is not supported")):
        copy = shutil.copytree(FOREIGN / Path(name).parent, tmp_path / "copy" / Path(name).parent, dirs_exist_ok=True)
        config = json.loads((copy / Path(name).name).read_text())
        (copy / Path(name).name).write_text(json.dumps(config | {key: value}))
        fails(copy, message)
    moved = tmp_path / "elsewhere" / "layer3.sae.pt"
    moved.parent.mkdir()
    shutil.copy(tmp_path / QWEN / made.qwen_scope(tmp_path), moved)
    fails(moved, "does not say how many latents are active: only its repository's name does")
    npz = tmp_path / "google/gemma-scope-2b-pt-res" / made.gemma_scope(tmp_path)
    unknown = shutil.copytree(npz, tmp_path / "gemma")
    fails(unknown, "does not say which site it reads; give --site")
    assert open_sae(unknown, Site(20)).site == Site(20)
    fails(npz, "says that this SAE reads layers.20; leave --site out", site=Site(3))


def test_kinds_that_are_not_read(tmp_path):
    """One line that says what it is, and what to do."""
    crosscoder = {"encoder.weight": torch.zeros(2, 16, 48), "encoder.bias": torch.zeros(48),
                  "decoder.weight": torch.zeros(2, 48, 16), "decoder.bias": torch.zeros(2, 16)}
    (tmp_path / "named").mkdir()
    torch.save(crosscoder, tmp_path / "named/ae.pt")
    (tmp_path / "named/config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}}))
    (tmp_path / "unnamed").mkdir()
    save_file(crosscoder, tmp_path / "unnamed/model.safetensors")
    (tmp_path / "unnamed/config.json").write_text("{}")
    is_one = "it is a crosscoder, which reads several layers or models at once: .* or train one here"
    for path, message in (("named", "config.json: trainer.dict_class 'CrossCoder': "),
                          ("unnamed", r"unnamed: its encoder is \[2, 16, 48\]: "),
                          ("unnamed/model.safetensors", r"model.safetensors: its encoder is \[2, 16, 48\]: ")):
        with pytest.raises(UserError, match=message + is_one) as refusal:
            open_sae(tmp_path / path)
        assert "\n" not in str(refusal.value)
    for name, what in (("temporal", "codes depend on earlier tokens"), ("matching_pursuit", "picks latents one after")):
        (tmp_path / "cfg.json").write_text(json.dumps({"architecture": name, "d_in": 16, "d_sae": 48,
                                                       "metadata": {"sae_lens_version": "6.54.12"}}))
        save_file({"W_enc": torch.zeros(16, 48)}, tmp_path / "sae_weights.safetensors")
        with pytest.raises(UserError, match=f"architecture '{name}': .*{what}.*: use SAELens for it"):
            open_sae(tmp_path)


def test_arrays_of_objects_are_refused(tmp_path):
    import numpy as np

    np.savez(tmp_path / "params.npz", W_enc=np.array([object()], dtype=object), threshold=np.zeros(3))
    with pytest.raises(UserError, match=r"params.npz was refused: W_enc is a pickle"):
        open_sae(tmp_path)


def test_a_header_whose_length_begins_as_a_pickle_does(tmp_path):
    """The header of a safetensors file is 8 n bytes long: one in 32 begins with the byte 0x80."""
    names = ("a" * length for length in range(1, 300))
    for name in names:
        save_file({name: torch.zeros(2)}, tmp_path / "file.safetensors")
        if (tmp_path / "file.safetensors").read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no such header")
    with (tmp_path / "file.safetensors").open("rb") as file:
        assert read_header(file, "file").shapes == {name: (2,)}
    assert not is_torch_file((tmp_path / "file.safetensors").open("rb"))
    assert list(read_tensors(tmp_path / "file.safetensors")) == [name]


def _without(settings, *keys):
    return {key: value for key, value in settings.items() if key not in keys}


@pytest.mark.parametrize(("settings", "tensors", "message"), [
    (lambda cfg: _without(cfg, "d_in", "d_sae"), dict, "has d_in 256, d_sae 24; cfg.json lacks d_in and d_sae: "),
    (lambda cfg: cfg | {"d_sae": 48}, dict, "has d_in 256, d_sae 24; cfg.json says 256, 48: they are not of one SAE"),
    (dict, lambda one: one | {"W_dec": one["W_dec"].T.contiguous()},
     r"W_dec has shape \[256, 24\], as W_enc has, not \[24, 256\]: save it transposed"),
    (dict, None, "sae_weights.safetensors is missing: download"),
    (dict, 1000, r"sae_weights.safetensors is cut off: it has 1000 of \d+ bytes; download it again"),
], ids=["config without widths", "another config", "transposed decoder", "no weights", "cut off"])
def test_a_folder_of_saelens(tmp_path, settings, tensors, message):
    """Each is found before anything heavy is loaded, so `olmoscope inspect` says it too."""
    folder = shutil.copytree(FOREIGN / "one_site/saelens", tmp_path / "sae")
    config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    config.write_text(json.dumps(settings(json.loads(config.read_text()))))
    if tensors is None:
        weights.unlink()
    elif isinstance(tensors, int):
        weights.write_bytes(weights.read_bytes()[:tensors])
    else:
        save_file(tensors(load_file(weights)), weights)
    for opening in (look_at, open_sae):
        with pytest.raises(UserError, match=message) as refusal:
            opening(folder)
        assert "\n" not in str(refusal.value)
