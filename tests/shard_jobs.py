"""Training a sharded SAE on some ranks: jobs that tests in several files give to their ranks."""

import hashlib
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor

from olmoscope.activations.store.reader import open_store
from olmoscope.activations.stream.rounds import StoreRounds
from olmoscope.distributed.launch import World
from olmoscope.distributed.ranks import Ranks
from olmoscope.errors import AnotherRankFailedError, UserError
from olmoscope.recipe.schema import Activation, Candidates, Recipe
from olmoscope.sae.topk import TopK
from olmoscope.train import group
from olmoscope.train.adam import Adam
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.group import train_from_store
from olmoscope.train.sharded_step import ShardedStep
from olmoscope.train.shards import Shard, own_shards, shard_bounds

ADAM = Adam((0.9, 0.999), 1e-8, decoder_rate=3.0, scale_biases=True)


@dataclass(frozen=True)
class Case:
    """An SAE, its shards, its batches."""

    shards: int
    d_model: int = 24
    d_sae: int = 131
    k: int = 6
    tied: bool = False
    normalize: str = "none"
    activation: Activation = "topk"
    rows: tuple[int, ...] = (40, 40, 40, 40, 40, 17)
    adam: Adam = ADAM
    auxiliary: SettledAuxiliary | None = None
    matryoshka: tuple[float, ...] = ()
    candidates: Candidates | None = None
    pulled: bool = False
    """Whether there is a loss beside the NMSE."""
    dtype: torch.dtype = torch.float32
    writes: int | None = None
    """For a transcoder with a skip: the width of the rows that it writes."""
    seed: int = 0
    equal: bool = False
    """Whether latents come in equal pairs, which gives ties everywhere."""
    sick: tuple[int, ...] = field(default=())
    """Latents that are dead from the start."""

    def sae(self) -> TopK:
        draw = torch.Generator().manual_seed(self.seed)
        W_FD = torch.randn(self.d_sae, self.d_model, generator=draw, dtype=torch.float64)
        if self.equal:
            W_FD[self.d_sae // 2 : self.d_sae // 2 * 2] = W_FD[: self.d_sae // 2]
        W_FD /= W_FD.norm(dim=1, keepdim=True)
        b_F = torch.zeros(self.d_sae, dtype=torch.float64)
        b_F[list(self.sick)] = -1000
        W_FD, b_F = W_FD.to(self.dtype), b_F.to(self.dtype)
        W_enc_FD = W_FD if self.tied else W_FD.clone()
        b_D = torch.randn(self.d_model, generator=draw, dtype=torch.float64).to(self.dtype)
        if self.writes:
            more = [torch.randn(*shape, generator=draw, dtype=torch.float64).to(self.dtype)
                    for shape in ((self.d_sae, self.writes), (self.writes,), (self.writes, self.d_model))]
            more[0] /= more[0].norm(dim=1, keepdim=True)
            return TopK(W_FD, more[0], b_D, "none", b_F, self.k, b_out=more[1], W_skip=more[2], transcoder=True)
        return TopK(W_enc_FD, W_FD, b_in=b_D, normalize=self.normalize, b_latent=b_F, k=self.k)

    def batches(self) -> list[Tensor]:
        draw = torch.Generator().manual_seed(self.seed + 1)
        width = self.d_model + (self.writes or 0)
        return [(2 * torch.randn(rows, width, generator=draw, dtype=torch.float64) + 0.3).to(self.dtype)
                for rows in self.rows]

    def ends(self, x_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows read and the target rows of a batch, in the form that `Step` takes."""
        return (x_BD[:, : self.d_model], x_BD[:, self.d_model :]) if self.writes else (x_BD, None)


def pull(xhat_BD: Tensor, y_BD: Tensor, e_BD: Tensor) -> Tensor:
    """The gradient that another loss beside the NMSE would add."""
    return e_BD.norm() * torch.sin(xhat_BD) + 0.1 * (xhat_BD - y_BD).clamp(-1, 1) / len(y_BD)


def sharded(case: Case, ranks: Ranks) -> ShardedStep:
    """A new step with the shards of this rank."""
    whole = case.sae()
    bounds = shard_bounds(case.d_sae, case.shards)
    shards = []
    if (skip := whole.W_skip) is not None:
        skip = skip.clone()
    b_in_D = whole.b_in.clone()
    b_out_D = b_in_D if whole.b_out is whole.b_in else whole.b_out.clone()
    for number in own_shards(case.shards, ranks):
        own = slice(bounds[number], bounds[number + 1])
        W_dec_FD = whole.W_dec[own].clone()
        W_enc_FD = W_dec_FD if case.tied else whole.W_enc[own].clone()
        shards.append(Shard(number, case.shards, TopK(
            W_enc_FD, W_dec_FD, b_in_D, case.normalize, whole.b_latent[own].clone(), case.k, b_out=b_out_D,
            W_skip=skip, transcoder=whole.transcoder), case.adam, case.d_sae, case.activation,
            candidates=case.candidates))
    return ShardedStep(shards, case.adam, case.auxiliary, ranks, case.matryoshka)


def train(ranks: Ranks, case: Case, lr: float = 1e-2) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], list]:
    """The shards of a rank after all batches, the shared tensors, and its counts."""
    step = sharded(case, ranks)
    counted = []
    for number, x_BD in enumerate(case.batches()):
        x_BD, target_BD = case.ends(x_BD)
        step(x_BD, lr, target_BD, pull if case.pulled else None)
        if number % 3 == 2:
            counted.append((*step.take_sums(), step.dead_share(60)))
        if step.candidates:
            counted.append((step.candidates.judge(step.count), step.candidates.take_found(), step.candidates.margin))
    return [shard.tensors() for shard in step.shards], step.shared_tensors(), counted


def joined(found: list) -> tuple[dict[str, Tensor], list]:
    """The whole SAE from the results of `train` on each rank; the ranks must agree on the shared tensors."""
    for _, shared, counted in found[1:]:
        assert repr(counted) == repr(found[0][2])
        assert all(same(shared[name], tensor) for name, tensor in found[0][1].items())
    shards = [shard for shards, _, _ in found for shard in shards]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    return whole | found[0][1], found[0][2]


def same(one: Tensor, other: Tensor) -> bool:
    """Equality bit for bit, including NaN."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))



def train_recipe(ranks: Ranks, job: Recipe, store: Path, out: Path, stop_at: int | None = None,
                 told: str = "last", damaged: tuple[int, Path] | None = None) -> str | list[str]:
    """Train the SAEs of a recipe on these ranks together.

    Args:
        stop_at: the number of steps after which the `told` ranks, `last` or `all`, get a SIGTERM.
        damaged: a rank, and the copy of the store that it reads; after the first epoch a segment there is damaged.

    Returns:
        The ids of the SAEs that this rank reports as done; or `stopped`; or why it ended.
    """
    call, read = ShardedStep.__call__, StoreRounds.read

    def stopping(self: ShardedStep, *arguments: Any) -> None:
        call(self, *arguments)
        if self.count == stop_at and self.k == job.saes[0].k and (told == "all" or ranks.index == ranks.count - 1):
            os.kill(os.getpid(), signal.SIGTERM)

    def damaging(self: StoreRounds, epoch: int, *arguments: Any) -> Any:
        if damaged and ranks.index == damaged[0] and epoch == 1:
            path = damaged[1] / "layer_01" / "segment-000003.safetensors"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        return read(self, epoch, *arguments)

    if damaged and ranks.index == damaged[0]:
        store = damaged[1]
    with mock.patch.object(group, "assign", lambda recipe, saes, *rest: [(ranks, list(saes))]), \
            mock.patch.object(ShardedStep, "__call__", stopping), mock.patch.object(StoreRounds, "read", damaging):
        try:
            return [sae.id for sae, _ in train_from_store(job, job.saes, open_store(store), out, world=World(ranks))]
        except KeyboardInterrupt:
            return "stopped"
        except AnotherRankFailedError:
            return "another rank failed"
        except UserError as error:
            return str(error)


def contents(run: Path) -> dict[str, Any]:
    """The content of a run folder, except for durations and dates."""
    found: dict[str, Any] = {"metrics": (run / "metrics.jsonl").read_text()}
    if (run / "done.json").exists():
        found["done"] = json.loads((run / "done.json").read_text())
        del found["done"]["seconds"], found["done"]["provenance"]
    for path in sorted((run / "checkpoints").rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["olmoscope"])
            metadata.get("loop", {}).pop("seconds", None)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the file is no mapping)
        found[str(path.relative_to(run))] = (metadata, {
            name: hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in tensors.items()})
    return found
