"""Checkpoints of the reference trainer, made as it makes them."""

from collections import OrderedDict

import torch
from torch import nn

LATENTS, INPUTS, K = 48, 16, 5


def checkpoint(**changes) -> dict:
    """A checkpoint as the trainer saves it: an optimiser with tensors, numbers, texts."""
    generator = torch.Generator().manual_seed(0)
    W_FD = nn.functional.normalize(torch.randn(LATENTS, INPUTS, generator=generator), dim=1)
    model = OrderedDict({
        "pre_bias": torch.randn(INPUTS, generator=generator), "latent_bias": torch.randn(LATENTS, generator=generator),
        "stats_last_nonzero": torch.zeros(LATENTS, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(LATENTS),
        "latents_mean_square": torch.ones(LATENTS), "encoder.weight": W_FD, "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"}})
    model.update(changes.pop("model", {}))
    for name in [name for name, value in model.items() if value is None]:
        del model[name]
    weight = nn.Parameter(W_FD.clone())
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    tree = {"model": model, "optimizer": optimizer.state_dict(), "layer": 15, "n_inputs": INPUTS, "n_latents": LATENTS,
            "top_k": K, "batch_size": 256, "lr": 3e-4, "normalize": False, "mean_loss": 0.3033, "shard": "a.npy"}
    tree |= changes
    return {name: value for name, value in tree.items() if value is not None}
