"""Makes the files in this folder: small SAEs written by other tools' own classes, and their outputs for some rows.

    python tests/foreign/make.py sparsify             eai-sparsify 1.3.3; without a GPU, with SPARSIFY_DISABLE_TRITON=1
    python tests/foreign/make.py dictionary_learning  dictionary-learning 0.1.0
    python tests/foreign/make.py llamascopium         llamascopium 2.0.0b34

each in an environment of its own that has that package. tests/sae/io/test_owners.py reads them. Beside each SAE is
`expected.safetensors`: `x` [rows, D], `codes` [rows, F], `out` [rows, D], all float32.

Rows: ordinary ones, zeros, one that is b_dec itself, outliers a thousand times as large, and rows on which two latents
tie (latents 0 and 1 have the same encoder).
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
D, F, K, ROWS = 16, 40, 6, 24


def randomize(module, seed):
    """Move every parameter away from its initial value; thresholds are positive; latents 0 and 1 have the same
    encoder."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.4 if parameter.dim() > 1 else 0.3))
            if "threshold" in name:
                parameter.copy_(parameter.abs() * (-1 if "log" in name else 1))
            shape = tuple(parameter.shape)
            if ("enc" in name or "W_E" in name or "b_E" in name) and "dec" not in name:
                if shape[0] == F:
                    parameter[1] = parameter[0]
                elif shape == (D, F):
                    parameter[:, 1] = parameter[:, 0]
    return module


def rows(b_D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(ROWS, D, generator=generator) * torch.linspace(0.5, 3, D) + 0.5
    x_BD[3], x_BD[4] = 0, b_D
    x_BD[5:8] *= 1000
    return x_BD


def keep(folder, x_BD, codes_BF, out_BD):
    tensors = {"x": x_BD, "codes": codes_BF, "out": out_BD}
    save_file({name: tensor.detach().float().contiguous() for name, tensor in tensors.items()},
              folder / "expected.safetensors")


def dense(values_BK, indices_BK):
    return torch.zeros(len(values_BK), F).scatter_add_(1, indices_BK, values_BK.detach())


def sparsify():
    from sparsify import SparseCoder, SparseCoderConfig

    settings = {
        "topk/layers.3": {"normalize_decoder": True}, "groupmax/layers.2": {"activation": "groupmax", "k": 8},
        "expansion/h.5": {"num_latents": 0, "normalize_decoder": False}, "transcoder/layers.1.mlp": {"transcode": True},
        "skip/layers.1.mlp": {"transcode": True, "skip_connection": True}}
    for seed, (name, changes) in enumerate(settings.items()):
        folder = HERE / "sparsify" / name
        config = SparseCoderConfig(**({"num_latents": F, "k": K, "expansion_factor": 2.5} | changes))
        if not config.num_latents:
            config.expansion_factor = F / D
        coder = SparseCoder(D, config) if config.num_latents else _expanded(SparseCoder, config)
        randomize(coder, seed)
        coder.save_to_disk(folder)
        (folder.parent / "config.json").write_text(json.dumps({"model": "some/model", "ctx_len": 256}))
        x_BD = rows(coder.b_dec)
        values, indices, _ = coder.encode(x_BD)
        keep(folder, x_BD, dense(values, indices), coder(x_BD).sae_out)


def _expanded(coder_class, config):
    """`expansion_factor` is an integer there, so F would be a multiple of D; these settings say 2.5 times."""
    config.num_latents = F
    coder = coder_class(D, config)
    config.num_latents = 0
    return coder


def dictionary_learning():
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = {"AutoEncoder": AutoEncoder(D, F), "AutoEncoderNew": AutoEncoderNew(D, F),
            "AutoEncoderTopK": AutoEncoderTopK(D, F, K), "BatchTopKSAE": BatchTopKSAE(D, F, K),
            "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, F, K, [16, F - 16]),
            "GatedAutoEncoder": GatedAutoEncoder(D, F), "JumpReluAutoEncoder": JumpReluAutoEncoder(D, F)}
    for seed, (name, dictionary) in enumerate(made.items()):
        randomize(dictionary, seed)
        if hasattr(dictionary, "threshold") and dictionary.threshold.dim() == 0:
            dictionary.threshold.fill_(0.8)
        folder = HERE / "dictionary_learning" / name / "trainer_0"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(dictionary.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({
            "trainer": {"dict_class": name, "activation_dim": D, "dict_size": F, "layer": 5, "lm_name": "some/model",
                        "submodule_name": "resid_post_layer_5", **({"k": K} if "TopK" in name else {})},
            "buffer": {"ctx_len": 128, "d_submodule": D, "io": "out"}}))
        bias = next(getattr(dictionary, key) for key in ("b_dec", "bias", "decoder_bias", "decoder")
                    if hasattr(dictionary, key))
        x_BD = rows(bias.bias if hasattr(bias, "bias") else bias)
        codes_BF = dictionary.encode(x_BD)
        keep(folder, x_BD, codes_BF, dictionary.decode(codes_BF))


def llamascopium():
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    hook = "blocks.4.hook_resid_post"
    settings = {
        "relu": {"act_fn": "relu", "norm_activation": "inference"},
        "jumprelu": {"act_fn": "jumprelu", "norm_activation": "dataset-wise"},
        "jumprelu_plain": {"act_fn": "jumprelu", "norm_activation": "inference",
                           "sparsity_include_decoder_norm": False},
        "topk": {"act_fn": "topk", "norm_activation": "token-wise", "sparsity_include_decoder_norm": False},
        "topk_norm": {"act_fn": "topk", "norm_activation": "dataset-wise"}}
    for seed, (name, changes) in enumerate(settings.items()):
        folder = HERE / "llamascopium" / name
        config = SAEConfig(hook_point_in=hook, hook_point_out=hook, d_model=D, expansion_factor=F / D, top_k=K,
                           device="cpu", dtype=torch.float32, **changes)
        sae = randomize(SparseAutoEncoder(config), seed)
        if changes["norm_activation"] == "dataset-wise":
            sae.set_dataset_average_activation_norm({hook: 7.5})
        sae.save_pretrained(str(folder))
        config.save_hyperparameters(str(folder))
        x_BD = rows(sae.b_D)
        normal, scales = sae.normalize_activations({hook: x_BD}, return_scale_factor=True)
        codes_BF = sae.encode(normal[hook])
        out = sae.denormalize_activations({hook: sae.decode(codes_BF)}, scales)[hook]
        keep(folder, x_BD, codes_BF, out)


if __name__ == "__main__":
    with torch.no_grad():
        {"sparsify": sparsify, "dictionary_learning": dictionary_learning, "llamascopium": llamascopium}[sys.argv[1]]()
