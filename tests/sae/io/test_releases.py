"""Other people's releases, in files made by hand (tests/foreign_files.py), compute the same as with SAELens' loaders.
If SAELens has no loader, or differs from the owner, they compute the owner's formula in float64."""

import importlib

import pytest
import torch
from safetensors.torch import load_file

import foreign_files as made
from foreign_files import D, F, rows
from olmoscope.sae.io.open import look_at, open_sae
from olmoscope.sae.io.place import Here
from olmoscope.sae.io.registered import Registered
from olmoscope.site import EMBED, Site


def close(found_BX, wanted_BX, x_BD):
    """To 1e-6 of a row's size, or of 1."""
    wanted_BX = wanted_BX.detach()
    scale_B1 = wanted_BX.abs().amax(dim=1, keepdim=True).maximum(x_BD.abs().amax(dim=1, keepdim=True)).clamp_min(1)
    assert float(((found_BX - wanted_BX) / scale_B1).abs().max()) < 1e-6


def theirs(monkeypatch, root, loader, repo, folder, overrides=None, scale=None):
    """The SAE that SAELens' loader of this name makes from a folder in place of the hub."""
    from huggingface_hub.utils import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.registry import get_sae_class

    def download(repo_id, filename, subfolder=None, **_):
        path = root / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(str(path))
        return str(path)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda repo_id, filename: {
        name: list(tensor.shape) for name, tensor in load_file(root / repo_id / filename).items()})
    config, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](
        repo, folder, device="cpu", force_download=False, cfg_overrides={"dtype": "float32", **(overrides or {})})
    config = loaders.handle_config_defaulting(config)
    sae_class, config_class = get_sae_class(config["architecture"])
    sae = sae_class(config_class.from_dict(config))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae


SIZE = {"d_in": D, "d_sae": F}
CONFIG = {"architecture": "jump_relu", "model_name": "gemma-v3-4b-pt", "affine_connection": True,
          "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
          "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output"}

CASES = {
    "Gemma Scope": ("gemma_2", "google/gemma-scope-2b-pt-res", made.gemma_scope, {}, SIZE,
                    Site(20), Site(20), "google/gemma-2-2b"),
    "Gemma Scope, small letters": ("gemma_2", "google/gemma-scope-9b-it-res", made.gemma_scope, {"small": True}, SIZE,
                                   Site(20), Site(20), "google/gemma-2-9b-it"),
    "Gemma Scope, attention": ("gemma_2", "google/gemma-scope-2b-pt-att", made.gemma_scope, {},
                               {**SIZE, "reshape_activations": "none"},
                               Site(20, "attn.z"), Site(20, "attn.z"), "google/gemma-2-2b"),
    "Gemma Scope, MLP": ("gemma_2", "google/gemma-scope-2b-pt-mlp", made.gemma_scope, {}, SIZE,
                         Site(20, "mlp.out"), Site(20, "mlp.out"), "google/gemma-2-2b"),
    "Gemma Scope 2": ("gemma_3", "google/gemma-scope-2-4b-pt", made.gemma_scope_2, {}, {},
                      Site(17), Site(17), "google/gemma-3-4b-pt"),
    "Gemma Scope 2, attention": ("gemma_3", "google/gemma-scope-2-270m-pt", made.gemma_scope_2,
                                 {"path": "attn_out_all/layer_2_width_16k_l0_small"}, {},
                                 Site(2, "attn.z"), Site(2, "attn.z"), "google/gemma-3-270m"),
    "Gemma Scope 2, transcoder": ("gemma_3", "google/gemma-scope-2-4b-pt", made.gemma_scope_2,
                                  {"path": "transcoder/layer_9_width_16k_l0_big"}, {},
                                  Site(9, "mlp.in"), Site(9, "mlp.out"), "google/gemma-3-4b-pt"),
    "Gemma Scope 2, affine": ("gemma_3", "google/gemma-scope-2-4b-pt", made.gemma_scope_2,
                              {"path": "transcoder_all/layer_9_width_16k_l0_big_affine", "config": CONFIG}, {},
                              Site(9, "mlp.in"), Site(9, "mlp.out"), "google/gemma-3-4b-pt"),
    "Llama Scope": ("llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x", made.llama_scope, {}, {},
                    Site(15), Site(15), "meta-llama/Llama-3.1-8B"),
    "R1-Distill": ("llama_scope_r1_distill", "fnlp/Llama-Scope-R1-Distill", made.llama_scope_r1, {}, {},
                   Site(7), Site(7), "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    "Qwen-Scope": ("qwen_scope", "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_20", made.qwen_scope, {}, {"d_in": D},
                   Site(9), Site(9), "Qwen/Qwen3-1.7B-Base"),
    "Goodfire": ("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", made.goodfire, {}, SIZE,
                 Site(19), Site(19), "meta-llama/Llama-3.1-8B-Instruct"),
    "qresearch": ("deepseek_r1", "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", made.deepseek, {}, SIZE,
                  Site(19), Site(19), "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    "hook_z": ("connor_rob_hook_z", "ckkissane/attn-saes-gpt2-small-all-layers", made.hook_z, {},
               {"reshape_activations": "none"}, Site(3, "attn.z"), Site(3, "attn.z"), "gpt2-small"),
    "mwhanna": ("mwhanna_transcoder", "mwhanna/qwen3-4b-transcoders", made.circuit_tracer, {}, {},
                Site(4, "mlp.in"), Site(4, "mlp.out"), "Qwen/Qwen3-4B"),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_saelens_loader(tmp_path, monkeypatch, case):
    loader, repo, make, settings, overrides, reads, writes, model = CASES[case]
    path = make(tmp_path, repo=repo, **settings)
    scale = {"llama_scope": D**0.5 / 5.0, "llama_scope_r1_distill": 0.4}.get(loader)
    other = theirs(monkeypatch, tmp_path, loader, repo, path, overrides, scale)
    place = Here(tmp_path / repo / path)
    if loader == "llama_scope_r1_distill":
        place.registered = Registered("release", "id", repo, path, "model", loader, scale=scale)
    form = importlib.import_module("olmoscope.sae.io.open").format_of(place)
    reading, opened = form.look(place), form.read(place)
    x_BD = rows()
    with torch.no_grad():
        z_BF = other.encode(x_BD)
        out_BD = other.decode(z_BF)
        if getattr(other, "W_skip", None) is not None:
            out_BD = out_BD + x_BD @ other.W_skip.T
    found_BD, codes = opened.sae.reconstruct(x_BD)
    codes_BF, z_BF = codes.to_dense(), z_BF.to_dense() if z_BF.is_sparse else z_BF
    assert 0 < float((z_BF > 0).double().mean()) < 0.7
    tie_B = (codes_BF != 0).ne(z_BF != 0)[:, :2].any(dim=1)  # latents 0 and 1 tie for the last place of a row
    close(codes_BF[~tie_B], z_BF[~tie_B], x_BD[~tie_B])
    close(found_BD[~tie_B], out_BD[~tie_B], x_BD[~tie_B])
    assert int(tie_B.sum()) <= 3
    assert (opened.reads, opened.writes, opened.model_name) == ((reads,), (writes,), model)
    assert (reading.reads, reading.writes, reading.d_sae) == ((reads,), (writes,), opened.sae.d_sae)


def by_formula(p, x_BD, rule, *, skip=False):
    """JumpReLU or another rule of the parameters, in float64."""
    p = {name: tensor.double() for name, tensor in p.items()}
    x_BD = x_BD.double()
    z_BF = rule(x_BD @ p["W_enc"] + p["b_enc"])
    return z_BF.float(), (z_BF @ p["W_dec"] + p["b_dec"] + (x_BD @ p["W_skip"].T if skip else 0)).float()


def topk(k):
    def rule(pre_BF):
        values, indices = pre_BF.relu().topk(k)
        return torch.zeros_like(pre_BF).scatter(1, indices, values)

    return rule


def test_transcoders_of_gemma_scope_read_rows_in_their_own_scale(tmp_path):
    """ln2.hook_normalized is the stream between attention and MLP, divided by its root mean square."""
    path = made.gemma_scope(tmp_path, "google/gemma-scope-2b-pt-transcoders", "layer_3/width_16k/average_l0_76")
    opened, x_BD, p = open_sae(tmp_path / "google/gemma-scope-2b-pt-transcoders" / path), rows(), made.parameters()
    assert (opened.reads, opened.writes) == ((Site(3, "mid"),), (Site(3, "mlp.out"),))
    normal_BD = x_BD.double() / (x_BD.double().pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt()  # Gemma's own epsilon
    z_BF, out_BD = by_formula(p, normal_BD, lambda pre: torch.where(pre > p["threshold"], pre, 0).relu())
    found_BD, codes = opened.sae.reconstruct(x_BD)
    torch.testing.assert_close(codes.to_dense(), z_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_BD, out_BD, rtol=1e-5, atol=1e-5)


def test_embedding_of_gemma_scope(tmp_path):
    """It was trained on embeddings before the factor √D, and so was b_dec."""
    repo = "google/gemma-scope-2b-pt-res"
    path = made.gemma_scope(tmp_path, repo, "embedding/width_4k/average_l0_6")
    opened, p, unscaled_BD = open_sae(tmp_path / repo / path), made.parameters(), rows()
    assert opened.site == EMBED
    z_BF, out_BD = by_formula(p, unscaled_BD, lambda pre: torch.where(pre > p["threshold"], pre, 0).relu())
    found_BD, codes = opened.sae.reconstruct(unscaled_BD * D**0.5)
    close(codes.to_dense(), z_BF, unscaled_BD)
    close(found_BD / D**0.5, out_BD, unscaled_BD)
    _, reading = look_at(tmp_path / repo / path)
    assert reading.stated == {"L0": 6} and "SAELens leaves out b_dec" in reading.notes[0]


@pytest.mark.parametrize(("settings", "rule", "words"), [
    ({"skip": True}, torch.relu, "W_skip x"),
    ({"threshold": True}, lambda pre: torch.where(pre > made.parameters()["threshold"], pre, 0).relu(), "threshold"),
    ({"config": {"activation": "topk", "k": 5}}, topk(5), "p where p is among the 5 largest and positive"),
])
def test_circuit_tracer(tmp_path, settings, rule, words):
    path = tmp_path / "some/set" / made.circuit_tracer(tmp_path, "some/set", **settings)
    opened, x_BD = open_sae(path), rows()
    z_BF, out_BD = by_formula(made.parameters(), x_BD, rule, skip="skip" in settings)
    found_BD, codes = opened.sae.reconstruct(x_BD)
    same_B = (codes.to_dense() != 0).eq(z_BF != 0).all(dim=1)
    assert int(same_B.sum()) > 15
    close(codes.to_dense()[same_B], z_BF[same_B], x_BD[same_B])
    close(found_BD[same_B], out_BD[same_B], x_BD[same_B])
    assert any(words in line for line in look_at(path)[1].formula())


@pytest.mark.parametrize("kind", ["circuit-tracer", "Gemma Scope 2"])
def test_cross_layer_transcoders_keep_all_that_they_write(tmp_path, kind):
    """Layer 1 of 3 writes layers 1 and 2, and all layers together make the MLP outputs."""
    gemma = kind == "Gemma Scope 2"
    repo = "google/gemma-scope-2-1b-it" if gemma else "mntss/clt-gemma-2-2b-2.5M"
    path = made.gemma_scope_2_clt(tmp_path, repo=repo) if gemma else made.clt(tmp_path, repo=repo, threshold=True)
    coders = [open_sae(tmp_path / repo / path.replace("1.safe", f"{layer}.safe")) for layer in range(3)]
    assert [[site.layer for site in coder.writes] for coder in coders] == [[0, 1, 2], [1, 2], [2]]
    assert {site.part for coder in coders for site in coder.writes} == {"mlp.out"}
    assert [coder.reads[0] for coder in coders] == [Site(n, "mlp.in" if gemma else "mid") for n in range(3)]
    xs = [rows(seed=layer) for layer in range(3)]
    sums, wanted = torch.zeros(3, len(xs[0]), D), torch.zeros(3, len(xs[0]), D)
    for layer, coder in enumerate(coders):
        p = made.parameters(seed=layer)
        W_dec_FLD = torch.randn(F, 3 - layer, D, generator=torch.Generator().manual_seed(layer))
        z_BF, _ = by_formula(p, xs[layer], lambda pre, t=p["threshold"]: torch.where(pre > t, pre, 0).relu())
        wanted[layer] += p["b_dec"]
        parts = coder.sae.reconstruct(xs[layer])[0].split(D, dim=1)
        for number, part_BD in enumerate(parts):
            sums[layer + number] += part_BD
            wanted[layer + number] += (z_BF.double() @ W_dec_FLD[:, number].double()).float()
    for found_BD, wanted_BD in zip(sums, wanted, strict=True):
        close(found_BD, wanted_BD, xs[0].maximum(xs[1]).maximum(xs[2]))
    assert "one layer of a cross-layer transcoder" in " ".join(look_at(tmp_path / repo / path)[1].notes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_openai(tmp_path, activation, tied):
    path = tmp_path / "sparse-autoencoder/gpt2-small" / made.openai(tmp_path, tied=tied, activation=activation)
    opened, x_BD, p = open_sae(path), rows(), made.parameters()
    assert (opened.site, opened.model_name, opened.sae.tied) == (Site(8), "openai-community/gpt2", tied)
    if tied:
        p["W_dec"] = p["W_enc"].T
    mean_B1, std_B1 = x_BD.double().mean(1, keepdim=True), x_BD.double().std(1, keepdim=True)
    if activation == "ReLU":
        mean_B1, std_B1 = torch.zeros(()), torch.ones(())
    normal_BD = (x_BD.double() - mean_B1) / (std_B1 + (1e-5 if activation == "TopK" else 0)) - p["b_dec"].double()
    z_BF, out_BD = by_formula(p, normal_BD, topk(7) if activation == "TopK" else torch.relu)
    found_BD, codes = opened.sae.reconstruct(x_BD)
    same_B = (codes.to_dense() != 0).eq(z_BF != 0).all(dim=1)
    assert int(same_B.sum()) > 15
    close(codes.to_dense()[same_B], z_BF[same_B], x_BD[same_B])
    close(found_BD[same_B], (out_BD.double() * std_B1 + mean_B1).float()[same_B], x_BD[same_B])


def test_goodfires_of_deepseek_r1(tmp_path):
    """Tied, with the k largest of each row; its owner takes those of the batch."""
    repo = "Goodfire/DeepSeek-R1-SAE-l37"
    path = tmp_path / repo / made.goodfire_r1(tmp_path, repo)
    opened, x_BD, p = open_sae(path), rows(), made.parameters(latents=96)
    p["W_dec"] = p["W_enc"].T
    z_BF, out_BD = by_formula(p, x_BD, topk(64))
    found_BD, codes = opened.sae.reconstruct(x_BD)
    assert (opened.sae.tied, opened.sae.k, opened.site) == (True, 64, Site(37))
    same_B = (codes.to_dense() != 0).eq(z_BF != 0).all(dim=1)
    close(codes.to_dense()[same_B], z_BF[same_B], x_BD[same_B])
    close(found_BD[same_B], out_BD[same_B], x_BD[same_B])
    assert "each row has its own k largest" in look_at(path)[1].notes[0]
