"""The training steps of other trainers, timed in their own environment; started by train_step.py with that Python.

Protocol: the arguments are peer, device, d_model, d_sae, k, batch. Then, for each line with a number n on standard
input, it makes n steps and writes their seconds as a JSON list, in one line on standard output.

Environment: Python with torch, `pip install sae-lens==6.54.12 eai-sparsify dictionary-learning`. It imports nothing
from Olmoscope. Each peer has its defaults except for the sizes, and runs the code of its own trainer.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable

import torch

TOKENS_A_SEQUENCE = 64
BATCHES = 4

Steps = Callable[[int], list[float]]


def batches(d_model: int, batch: int, device: str) -> list[torch.Tensor]:
    """The same random rows for all peers: normal, around a mean."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, d_model, generator=generator).add_(0.5).to(device) for _ in range(BATCHES)]


def timed(step: Callable[[int], object], device: str, clock: Callable[[], float] = time.perf_counter) -> Steps:
    """Time a function of the step's number."""
    count = 0

    def steps(number: int) -> list[float]:
        nonlocal count
        seconds = []
        for _ in range(number):
            start = clock()
            step(count)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - start)
            count += 1
        return seconds

    return steps


def saelens(d_model: int, d_sae: int, k: int, rows: list[torch.Tensor], device: str, sparse: bool = False) -> Steps:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    batch = len(rows[0])
    # Its sparse mode runs only without the rescaling (backward of that has no sparse form in torch 2.13).
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_model, d_sae=d_sae, k=k, use_sparse_activations=sparse,
                                                rescale_acts_by_decoder_norm=not sparse, device=device))
    trainer = SAETrainer(SAETrainerConfig(10**6 * batch, batch, lr_end=3e-4, device=device), sae, iter(()))
    sae.to(device)

    def step(count: int) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(rows[count % len(rows)])
        trainer.n_training_steps += 1

    return timed(step, device)


def saelens_sparse(d_model: int, d_sae: int, k: int, rows: list[torch.Tensor], device: str) -> Steps:
    return saelens(d_model, d_sae, k, rows, device, sparse=True)


def dictionary_learning(d_model: int, d_sae: int, k: int, rows: list[torch.Tensor], device: str) -> Steps:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(steps=10**6, activation_dim=d_model, dict_size=d_sae, k=k, layer=0, lm_name="none",
                          device=device)
    return timed(lambda count: trainer.update(count, rows[count % len(rows)]), device)


class Rows(torch.nn.Module):
    """A "language model" whose only layer outputs the benchmark's rows, for a trainer that needs a model."""

    def __init__(self, rows: list[torch.Tensor]) -> None:
        super().__init__()
        self.layer = torch.nn.Identity()
        self.rows = rows
        self.device = rows[0].device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
        self.calls: list[float] = []

    @property
    def base_model(self) -> "Rows":
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.calls.append(time.perf_counter())
        rows = self.rows[len(self.calls) % len(self.rows)]
        return self.layer(rows[:input_ids.numel()].view(*input_ids.shape, -1))


def sparsify(d_model: int, d_sae: int, k: int, rows: list[torch.Tensor], device: str,
             optimizer: str = "signum") -> Steps:
    os.environ.setdefault("WANDB_MODE", "disabled")
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    sequence = torch.zeros(TOKENS_A_SEQUENCE, dtype=torch.int64)
    sequences = len(rows[0]) // TOKENS_A_SEQUENCE
    config = TrainConfig(SparseCoderConfig(num_latents=d_sae, k=k), batch_size=sequences, hookpoints=["layer"],
                         optimizer=optimizer, save_every=10**9, log_to_wandb=False,
                         save_dir=tempfile.mkdtemp(prefix="sparsify-"))
    model = Rows(rows)
    trainer = Trainer(config, [{"input_ids": sequence}] * sequences, model)
    trainer.save = lambda: None  # fit() ends with a checkpoint, which is not part of a step

    def steps(number: int) -> list[float]:
        trainer.global_step = 0
        trainer.dataset = [{"input_ids": sequence}] * (sequences * (number + 1))
        model.calls.clear()
        trainer.fit()
        return [after - before for before, after in zip(model.calls, model.calls[1:], strict=False)]

    return steps


def sparsify_adam(d_model: int, d_sae: int, k: int, rows: list[torch.Tensor], device: str) -> Steps:
    return sparsify(d_model, d_sae, k, rows, device, optimizer="adam")


PEERS = {"saelens": saelens, "saelens sparse": saelens_sparse, "dictionary_learning": dictionary_learning,
         "sparsify": sparsify, "sparsify adam": sparsify_adam}


def main() -> None:
    peer, device, *numbers = sys.argv[1:]
    d_model, d_sae, k, batch = map(int, numbers)
    answers = os.fdopen(os.dup(1), "w")  # whatever the peers print goes to standard error
    os.dup2(2, 1)
    with contextlib.redirect_stdout(sys.stderr):
        steps = PEERS[peer](d_model, d_sae, k, batches(d_model, batch, device), device)
        for line in sys.stdin:
            print(json.dumps(steps(int(line))), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # so that modules of this folder do not hide theirs
    main()
