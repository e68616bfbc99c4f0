"""Small SAEs in the formats of other releases, made by hand. Names, shapes and orientations in the files are those that
the loaders of sae-lens 6.54.12 (`pretrained_sae_loaders.py`) and circuit-tracer 0.4.1 read.

Each function writes into a folder with the repository's name, since some facts are only in that name, and returns the
address within it. Shapes: D 16, F 48 (1,024 where a name says so), L layers written.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

D, F, ROWS = 16, 48, 20


def rows(width=D, seed=0):
    """Ordinary rows, one of zeros, and outliers."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(ROWS, width, generator=generator) * torch.linspace(0.5, 3, width) + 0.5
    x_BD[3] = 0
    x_BD[5:8] *= 1000
    return x_BD


def parameters(latents=F, width=None, seed=1):
    """W_enc `[D, F]`, W_dec `[F, D]`, biases, thresholds; latents 0 and 1 tie."""
    generator = torch.Generator().manual_seed(seed)
    out = width = width or D
    shapes = {"W_enc": (width, latents), "b_enc": (latents,), "W_dec": (latents, out), "b_dec": (out,),
              "threshold": (latents,), "W_skip": (out, width)}
    made = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["threshold"].abs_()
    made["W_enc"][:, 1], made["b_enc"][1], made["threshold"][1] = made["W_enc"][:, 0], made["b_enc"][0], made[
        "threshold"][0]
    return {name: tensor.contiguous() for name, tensor in made.items()}


def _saved(path: Path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)


def _json(path: Path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def gemma_scope(root, repo="google/gemma-scope-2b-pt-res", path="layer_20/width_16k/average_l0_71", small=False):
    p = parameters()
    if small:
        p = {name.replace("W_", "w_"): tensor for name, tensor in p.items()}
    _saved(root / repo / path / "params.npz", {name: tensor for name, tensor in p.items() if "skip" not in name})
    return path


def gemma_scope_2(root, path="resid_post/layer_17_width_16k_l0_big", config=None, repo="google/gemma-scope-2-4b-pt"):
    p = parameters()
    tensors = {name.lower(): p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    if "affine" in path:
        tensors["affine_skip_connection"] = p["W_skip"].T
    _saved(root / repo / path / "params.safetensors", tensors)
    if config is not None:
        _json(root / repo / path / "config.json", config)
    return path


def gemma_scope_2_clt(root, layer=1, layers=3, repo="google/gemma-scope-2-1b-it"):
    for number in range(layers):
        p = parameters(seed=number)
        W_dec_FLD = torch.randn(F, layers - number, D, generator=torch.Generator().manual_seed(number))
        tensors = {name.lower(): p[name] for name in ("W_enc", "b_enc", "b_dec", "threshold")} | {"w_dec": W_dec_FLD}
        _saved(root / repo / "clt/width_1k_l0_big" / f"layer_{number}.safetensors", tensors)
    return f"clt/width_1k_l0_big/layer_{layer}.safetensors"


def llama_scope(root, repo="fnlp/Llama3_1-8B-Base-LXR-8x", path="Llama3_1-8B-Base-L15R-8x", norm=5.0, **changes):
    p = parameters()
    _saved(root / repo / path / "checkpoints/final.safetensors", {
        "encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "decoder.weight": p["W_dec"].T,
        "decoder.bias": p["b_dec"]})
    _json(root / repo / path / "hyperparams.json", {
        "d_model": D, "d_sae": F, "hook_point_in": "blocks.15.hook_resid_post", "jump_relu_threshold": 0.7,
        "hook_point_out": "blocks.15.hook_resid_post", "dataset_average_activation_norm": {"in": norm, "out": norm},
        **changes})
    return path


def llama_scope_r1(root, repo="fnlp/Llama-Scope-R1-Distill", path="400M-Slimpajama-400M-OpenR1-Math-220k/L7R"):
    p = parameters()
    _saved(root / repo / path / "sae_weights.safetensors", {
        "encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "decoder.weight": p["W_dec"].T,
        "decoder.bias": p["b_dec"], "log_jumprelu_threshold": p["threshold"].log()})
    _json(root / repo / path / "config.json", {"d_model": D, "expansion_factor": F // D,
                                               "hook_point_in": "blocks.7.hook_resid_post"})
    return path


def qwen_scope(root, repo="Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_20", path="layer9.sae.pt", width=None):
    p = parameters(1024, width)
    _saved(root / repo / path, {"W_enc": p["W_enc"].T.contiguous(), "W_dec": p["W_dec"].T.contiguous(),
                                "b_enc": p["b_enc"], "b_dec": p["b_dec"]})
    return path


def goodfire(root, width=None, repo="Goodfire/Llama-3.1-8B-Instruct-SAE-l19", path="Llama-3.1-8B-Instruct-SAE-l19.pth"):
    p = parameters(width=width)
    _saved(root / repo / path, {
        "encoder_linear.weight": p["W_enc"].T, "encoder_linear.bias": p["b_enc"],
        "decoder_linear.weight": p["W_dec"].T, "decoder_linear.bias": p["b_dec"]})
    return path


def goodfire_r1(root, repo="Goodfire/DeepSeek-R1-SAE-l37", path="logic/DeepSeek-R1-SAE-l37.pt"):
    p = parameters(latents=96)
    _saved(root / repo / path, {"W": p["W_enc"], "b_enc": p["b_enc"], "b_dec": p["b_dec"]})
    return path


def deepseek(root, repo="qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19"):
    p, path = parameters(), "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    _saved(root / repo / path, {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"],
                                "decoder.weight": p["W_dec"].T, "decoder.bias": p["b_dec"]})
    return path


def hook_z(root, repo="ckkissane/attn-saes-gpt2-small-all-layers", path="gpt2-small_L3_Hcat_z_v9.pt"):
    p = parameters()
    _saved(root / repo / path, {name: p[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")})
    _json(root / repo / path.replace(".pt", "_cfg.json"), {
        "act_size": D, "dict_size": F, "act_name": "blocks.3.attn.hook_z", "model_name": "gpt2-small"})
    return path


def circuit_tracer(root, repo="mwhanna/qwen3-4b-transcoders", path="layer_4.safetensors", config=(), skip=False,
                   threshold=False, width=None):
    p = parameters(width=width)
    tensors = {"W_enc": p["W_enc"].T, "W_dec": p["W_dec"], "b_enc": p["b_enc"], "b_dec": p["b_dec"]}
    if skip:
        tensors["W_skip"] = p["W_skip"]
    if threshold:
        tensors["activation_function.threshold"] = p["threshold"]
    _saved(root / repo / path, tensors)
    said = {"model_name": "Qwen/Qwen3-4B", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
            "feature_output_hook": "hook_mlp_out", **dict(config)}
    (root / repo / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in said.items()))
    (root / repo / "wandb-config.yaml").write_text(
        f"d_model: {{value: {D}}}\nd_feature: {{value: {F}}}\nbatch_size: {{value: 256}}\n")
    return path


def clt(root, layer=1, layers=3, repo="mntss/clt-gemma-2-2b-2.5M", hook="hook_resid_mid", threshold=False,
        width=None):
    for number in range(layers):
        p = parameters(seed=number, width=width)
        generator = torch.Generator().manual_seed(number)
        encoder = {f"W_enc_{number}": p["W_enc"].T, f"b_enc_{number}": p["b_enc"], f"b_dec_{number}": p["b_dec"]}
        if threshold:
            encoder[f"threshold_{number}"] = p["threshold"]
        _saved(root / repo / f"W_enc_{number}.safetensors", encoder)
        _saved(root / repo / f"W_dec_{number}.safetensors",
               {f"W_dec_{number}": torch.randn(F, layers - number, width or D, generator=generator)})
    (root / repo / "config.yaml").write_text(
        f"model_name: google/gemma-2-2b\nmodel_kind: cross_layer_transcoder\nfeature_input_hook: {hook}\n"
        "feature_output_hook: hook_mlp_out\n")
    return f"W_enc_{layer}.safetensors"


def openai(root, repo="sparse-autoencoder/gpt2-small", path="resid_post_mlp_v5_32k/autoencoders/8.pt", tied=False,
           activation="TopK", **changes):
    p = parameters()
    decoder = {"decoder.linear.weight": p["W_enc"].T} if tied else {"decoder.weight": p["W_dec"].T}
    _saved(root / repo / path, {
        "encoder.weight": p["W_enc"].T, "pre_bias": p["b_dec"], "latent_bias": p["b_enc"], **decoder,
        "stats_last_nonzero": torch.zeros(F, dtype=torch.int64), "activation": activation,
        "activation_state_dict": {"k": 7, "postact_fn": "ReLU"} if activation == "TopK" else {}, **changes})
    return path
