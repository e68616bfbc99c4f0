"""Initial coders for training. Shapes: D width of the rows, F latents."""

import zlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from olmoscope.sae.normalize import Normalize
from olmoscope.sae.topk import TopK
from olmoscope.seeds import generator


def initialize(d_model: int, d_sae: int, k: int, normalize: Normalize, mean_D: Tensor, seed: int, name: str = "", *,
               tied: bool = True) -> TopK:
    """A fresh SAE: random unit rows, latent biases of 0, and `b_in` (which is also `b_out`) at the mean of the rows.

    Args:
        d_model: D.
        d_sae: F.
        k: the number of active latents per row.
        normalize: how the SAE normalises rows.
        mean_D: mean of the rows after normalization (`normalize_rows`), `[D]`.
        seed: the same seed and name give the same rows on every machine and device.
        name: the SAE's id. SAEs with the same seed and different names start from independent rows, even if their
            shapes are equal. Otherwise directions of different layers would be alike only because they started alike.
        tied: whether encoder and decoder are one matrix; otherwise they start equal.
    """
    device = mean_D.device
    W_FD = _unit_rows(d_sae, d_model, seed, name).to(device)
    return TopK(W_FD if tied else W_FD.clone(), W_FD, b_in=mean_D.float().clone(), normalize=normalize,
                b_latent=torch.zeros(d_sae, device=device), k=k)


def initialize_shard(latents: int, number: int, shared: TopK, seed: int, name: str) -> TopK:
    """Shard `number` of a fresh coder that is trained in shards. Its rows are drawn separately, so no process makes all
    of them.

    Args:
        latents: the number of latents of the shard.
        shared: the coder without latents. The shard uses its biases and its skip.
        seed, name: as in `initialize`.
    """
    def rows(bias_D: Tensor, name: str) -> Tensor:
        return _unit_rows(latents, len(bias_D), seed, name, number).to(shared.device)

    if shared.transcoder:
        W_enc, W_dec = rows(shared.b_in, f"{name}, encoder"), rows(shared.b_out, f"{name}, decoder")
    else:
        W_dec = rows(shared.b_in, name)
        W_enc = W_dec if shared.tied else W_dec.clone()
    return replace(shared, W_enc=W_enc, W_dec=W_dec, b_latent=torch.zeros(latents, device=shared.device))


def initialize_transcoder(d_sae: int, k: int, mean_in_D: Tensor, mean_out_D: Tensor, seed: int, name: str, *,
                          skip: bool) -> TopK:
    """A fresh transcoder: random unit rows, latent biases of 0, `b_in` and `b_out` at the means of the rows read and
    written, a skip of zeros.

    Args:
        mean_in_D, mean_out_D: means of the rows read `[D_in]` and written `[D_out]`, float.
        seed, name: as in `initialize`.
        skip: whether there is an affine map beside the latents.
    """
    b_in, b_out = mean_in_D.float().clone(), mean_out_D.float().clone()
    W_enc, W_dec = (_unit_rows(d_sae, len(mean), seed, f"{name}, {what}").to(mean.device)
                    for mean, what in ((b_in, "encoder"), (b_out, "decoder")))
    W_skip = torch.zeros(len(b_out), len(b_in), device=b_out.device) if skip else None
    return TopK(W_enc, W_dec, b_in, "none", torch.zeros(d_sae, device=b_in.device), k, b_out=b_out, W_skip=W_skip,
                transcoder=True)


def _unit_rows(rows: int, width: int, seed: int, name: str, *shard: int) -> Tensor:
    random = generator(seed, "rows of an SAE", zlib.crc32(name.encode()), *shard)
    W_FD = torch.from_numpy(random.standard_normal((rows, width), dtype=np.float32))
    W_FD /= W_FD.norm(dim=1, keepdim=True)
    return W_FD
