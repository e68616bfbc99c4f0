"""Trains one SAE with another trainer, in that trainer's environment; quality.py starts it with that Python.

    PYTHON quality_peers.py ROWS.safetensors OUT.safetensors '{"peer": ..., "d_sae": ..., "k": ..., "batch": ..., "lr": null, "seed": 0}'

ROWS holds `rows [N, D]` in the order of training. OUT gets `W_enc [F, D]`, `W_dec [F, D]` (unit rows), `b_latent`,
`b_pre`: the same function as the peer's own. Each trainer keeps its own settings, except for sizes and, if given, the
rate. Environment as for peers.py. It imports nothing from Olmoscope.
"""  # noqa: E501

import contextlib
import json
import os
import sys
import tempfile
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
TOKENS_A_SEQUENCE = 64


def saelens(rows_ND: torch.Tensor, d_sae: int, k: int, batch: int, lr: float | None) -> Weights:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=rows_ND.shape[1], d_sae=d_sae, k=k))
    rate: dict[str, Any] = {"lr_end": 3e-4} if lr is None else {"lr": lr, "lr_end": lr}
    trainer = SAETrainer(SAETrainerConfig(len(rows_ND), batch, **rate), sae, iter(()))
    for start in range(0, len(rows_ND), batch):
        trainer.maybe_reset_sparsity()
        trainer.step(rows_ND[start:start + batch].float())
        trainer.n_training_steps += 1
    sae.fold_W_dec_norm()
    return {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_latent": sae.b_enc, "b_pre": sae.b_dec}


def dictionary_learning(rows_ND: torch.Tensor, d_sae: int, k: int, batch: int, lr: float | None) -> Weights:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(steps=-(-len(rows_ND) // batch), activation_dim=rows_ND.shape[1], dict_size=d_sae, k=k,
                          layer=0, lm_name="none", lr=lr, device="cpu")
    for step, start in enumerate(range(0, len(rows_ND), batch)):
        trainer.update(step, rows_ND[start:start + batch].float())
    ae = trainer.ae
    return {"W_enc": ae.encoder.weight, "W_dec": ae.decoder.weight.T, "b_latent": ae.encoder.bias, "b_pre": ae.b_dec}


class Rows(torch.nn.Module):
    """A "language model" whose only layer outputs the rows, for a trainer that needs a model."""

    def __init__(self, rows_ND: torch.Tensor) -> None:
        super().__init__()
        self.layer = torch.nn.Identity()
        self.rows_ND = rows_ND
        self.device = rows_ND.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    @property
    def base_model(self) -> "Rows":
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.rows_ND[input_ids].float())


def sparsify(rows_ND: torch.Tensor, d_sae: int, k: int, batch: int, lr: float | None,
             optimizer: str = "signum") -> Weights:
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    sequences = [{"input_ids": torch.arange(start, start + TOKENS_A_SEQUENCE)}
                 for start in range(0, len(rows_ND) - TOKENS_A_SEQUENCE + 1, TOKENS_A_SEQUENCE)]
    config = TrainConfig(SparseCoderConfig(num_latents=d_sae, k=k), batch_size=batch // TOKENS_A_SEQUENCE, lr=lr,
                         hookpoints=["layer"], optimizer=optimizer, save_every=10**9, log_to_wandb=False,
                         save_dir=tempfile.mkdtemp(prefix="sparsify-"), init_seeds=[torch.initial_seed()])
    trainer = Trainer(config, sequences, Rows(rows_ND))
    trainer.save = lambda: None  # fit() would save at its end; the weights are read below instead
    trainer.fit()
    for used in trainer.optimizers:
        if hasattr(used, "eval"):  # schedule-free: the averaged weights are the result
            used.eval()
    sae = next(iter(trainer.saes.values()))
    sae.set_decoder_norm_to_unit_norm()
    return {"W_enc": sae.encoder.weight, "W_dec": sae.W_dec, "b_latent": sae.encoder.bias, "b_pre": sae.b_dec}


def sparsify_adam(rows_ND: torch.Tensor, d_sae: int, k: int, batch: int, lr: float | None) -> Weights:
    return sparsify(rows_ND, d_sae, k, batch, lr, optimizer="adam")


PEERS = {"saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify,
         "sparsify_adam": sparsify_adam}


def main() -> None:
    rows, out, settings_json = sys.argv[1:]
    settings = json.loads(settings_json)
    torch.manual_seed(settings.pop("seed"))
    with contextlib.redirect_stdout(sys.stderr):
        weights = PEERS[settings.pop("peer")](load_file(rows)["rows"], **settings)
    save_file({name: tensor.detach().float().contiguous().clone() for name, tensor in weights.items()}, out)


if __name__ == "__main__":
    sys.path.pop(0)  # so that modules of this folder do not hide theirs
    os.environ.setdefault("WANDB_MODE", "disabled")
    main()
