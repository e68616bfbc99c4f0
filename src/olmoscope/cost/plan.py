"""What a recipe will cost, computed before anything starts: text, disk, memory, FLOPs; hours from a measured rate.

A multiply and an add are two FLOPs; cost/model.py counts the FLOPs of the model. Memory is estimated from what is known
to be allocated at the peak:

    collection, model's device    weights + activations of a batch (cost/model.py) + on a GPU one segment of all sites
    collection, RAM               process + segments in memory, `SEGMENTS_HELD` of all sites
    training, SAE's device        train/memory.py
    training, RAM                 process + `ROUNDS_HELD` rounds of the stream; beside a GPU, a checkpoint's tensors

On a CPU, everything is in RAM, so the device's memory is added to the RAM.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmoscope.activations.collect.refusals import NORM_BYTES, ROW_BYTES, TOKEN_BYTES
from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.identity import is_of
from olmoscope.activations.store.place import find_elsewhere, is_elsewhere, store_places
from olmoscope.activations.stream.rounds import ROUND_ROWS
from olmoscope.cost.disk import present_bytes
from olmoscope.cost.measure import Rates
from olmoscope.cost.model import ModelCost, model_cost, site_width
from olmoscope.cost.ranks import BatchTraffic, StepTraffic, batch_traffic, first_of_ranks, step_traffic
from olmoscope.distributed.sums import team_size
from olmoscope.errors import UserError
from olmoscope.files import nearest_folder
from olmoscope.kernels.dispatch import kernels_for
from olmoscope.model.config import check_config, config_at_hand
from olmoscope.model.dtype import ComputeDtype, fast_dtype
from olmoscope.model.positions import check_context
from olmoscope.model_source import base_of, not_fetched
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.site import Site, deepest
from olmoscope.train.activation_rules import CAP
from olmoscope.train.checkpoint import kept_checkpoints
from olmoscope.train.derived import Settled, rate_of, settled
from olmoscope.train.memory import training_memory
from olmoscope.train.teams import refuse_idle_ranks
from olmoscope.units import format_bytes

PARAMETER_BYTES = {"bfloat16": 2, "float32": 4}
PROCESS_BYTES = 0.5e9
"""Python with torch and transformers, measured."""
SEGMENTS_HELD = 2
"""Segments in memory: one that is being filled and one that is being written."""
ROUNDS_HELD = 3
"""Copies of a round in memory: as read, joined, permuted."""
FEW_TOKENS_PER_LATENT = 300
"""With fewer training tokens, more passes over the text reduced the error by at least 9% (docs/recipe-study.md)."""


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a stage."""

    ram: float
    gpu: float
    """0 on a CPU."""


@dataclass(frozen=True)
class SAEPlan:
    """One SAE's cost."""

    sae: CoderConfig
    parameters: int
    state_bytes: int
    """Bytes of parameters and Adam's two moments, which training holds: the size of a checkpoint on disk."""
    kept: int
    """How many checkpoints remain at the end."""
    train: Settled
    """The settings of its training."""
    lr: float
    """The learning rate at which training begins."""
    steps: int
    flops: float
    """FLOPs of the one dense product of each step, 2 F d per row; the rest is sparse and under 1% of it."""
    memory: Memory
    """The memory of each process that trains it."""
    ranks: int
    """How many processes share it."""
    traffic: StepTraffic
    """What each of them sends to the others in a step, except for the next batch."""
    batch_traffic: BatchTraffic
    """What each of them sends of the next batch during a step."""
    batch_bytes: int
    """Bytes of a batch in the store."""
    tokens_per_latent: float
    """Training tokens of one pass over the text, per latent."""

    @property
    def finish_tokens(self) -> float:
        """About how many tokens the language model reads in the steps of `train.finish`; 0 without."""
        share = self.train.finish.share if self.train.finish else 0.0
        return share * self.train.epochs * self.tokens_per_latent * self.sae.d_sae

    @property
    def more_passes_help(self) -> bool:
        """Whether more passes over the same text are known to reduce the error; they were tried with SAEs only."""
        return self.tokens_per_latent < FEW_TOKENS_PER_LATENT and self.train.epochs == len(self.sae.sites) == 1


@dataclass(frozen=True)
class Plan:
    """A recipe's cost."""

    recipe: Recipe
    d_model: int
    compute_dtype: ComputeDtype
    """The dtype in which the language model computes."""
    gpu: bool
    """Whether the recipe would run on a GPU."""
    shares: dict[str, float] | None
    """Each source's share of the documents; None if shards decide."""
    sequences: int
    """Approximate number of sequences: the mean chunk length is known, but the lengths are not drawn."""
    segments: int
    site_bytes: dict[Site, int]
    """Bytes of the activations of each site, both splits."""
    store_bytes: int
    """Bytes of all sites, tokens and rows."""
    cost: ModelCost | None
    """None without the model's config."""
    collect_flops: float | None
    collect_memory: Memory | None
    saes: list[SAEPlan]
    disk_bytes: int
    """Bytes of the stores, the checkpoints that each SAE keeps, its export, and one more checkpoint being written."""
    present_bytes: int
    """How many of these bytes are in the output folder already."""
    free_bytes: int
    """Free bytes on the disk of the output folder."""
    rates: Rates | None
    """None if nothing was measured."""
    ranks: int
    """How many processes train."""
    nodes: int
    """How many machines they are on."""
    warnings: list[str]
    """What is possible but probably not intended, one line each."""
    verdict: str
    """What is known about the model's behaviour, in one line: it was tried now, when a store was begun, or not yet."""

    @property
    def tokens(self) -> int:
        """Training and held-out tokens."""
        return self.recipe.tokens.count + self.recipe.tokens.held_out

    @property
    def missing_bytes(self) -> int:
        """How many bytes the disk lacks; 0 if it has room."""
        return max(0, self.disk_bytes - self.present_bytes - self.free_bytes)

    def collect_hours(self) -> float | None:
        """Hours of collection at the measured rate; None if nothing was measured."""
        return None if self.rates is None else self.tokens / self.rates.tokens_per_second / 3600

    @property
    def devices(self) -> int:
        """How many devices like the measured one the processes have: one GPU each, or the processor of each machine."""
        return self.ranks if self.gpu else self.nodes

    def step_seconds(self, sae: SAEPlan) -> float | None:
        """Seconds of a training step, from the measured rate of the widest SAE in proportion to the dense product; None
        if nothing was measured. For several processes this is a lower bound: their exchanges are not counted."""
        if self.rates is None:
            return None
        share = sae.sae.d_sae * sae.train.batch / (self.rates.sae.d_sae * settled(self.recipe, self.rates.sae).batch)
        return self.rates.step_seconds * share / self._devices_of(sae)

    def finish_hours(self, sae: SAEPlan) -> float | None:
        """Hours that the language model takes in the steps of `train.finish`; None if nothing was measured."""
        if self.rates is None:
            return None
        seconds = self.rates.finish_seconds.get((sae.sae.writes or sae.sae.reads)[0], 0.0)
        return seconds * sae.finish_tokens / self._devices_of(sae) / 3600

    def train_hours(self, sae: SAEPlan) -> float | None:
        """Hours of training, from `step_seconds` and with a finish; None if nothing was measured."""
        seconds, finish = self.step_seconds(sae), self.finish_hours(sae)
        return None if seconds is None or finish is None else seconds * sae.steps / 3600 + finish

    def hours(self) -> float | None:
        """Hours of collection by one process, and of training all SAEs, as many at a time as there are teams; None if
        nothing was measured."""
        if (collecting := self.collect_hours()) is None:
            return None
        return collecting + sum((self.train_hours(sae) or 0) / self._teams(sae) for sae in self.saes)

    def feed(self) -> float | None:
        """The most bytes of activations per second that all processes together read in training; None if nothing was
        measured. SAEs of the same sites with the same batch share a read."""
        passes: dict[tuple[tuple[Site, ...], int], list[SAEPlan]] = {}
        for sae in self.saes:
            passes.setdefault((tuple(sae.sae.sites), sae.train.batch), []).append(sae)
        if self.rates is None:
            return None
        return max(saes[0].batch_bytes * self._teams(saes[0]) / sum(self.step_seconds(sae) or 0 for sae in saes)
                   for saes in passes.values())

    def _devices_of(self, sae: SAEPlan) -> int:
        return max(1, sae.ranks * self.devices // self.ranks)

    def _teams(self, sae: SAEPlan) -> int:
        """How many SAEs like this one train at the same time, each on its own devices."""
        return self.devices // self._devices_of(sae)


def plan(recipe: Recipe, out: Path, rates: Rates | None = None, ranks: int = 1, elsewhere: Path | None = None,
         nodes: int = 1) -> Plan:
    """Compute a recipe's cost.

    Args:
        out: the output folder; the free space of its disk is looked up.
        rates: the result of `measure`, from which hours are computed; None for no hours.
        ranks: how many processes would train.
        elsewhere: the store on which it would train (`train --store`), instead of one in `out`.
        nodes: how many machines the processes would be on, with the same number on each.

    Raises:
        UserError: the recipe does not give `model.d_model` and the model's config cannot be loaded; the recipe does not
            fit the config; that many processes cannot share its SAEs, or be divided equally among that many machines;
            or there is no store elsewhere.
    """
    stores = store_places(out) if elsewhere is None else find_elsewhere(out, elsewhere)
    refuse_idle_ranks(recipe, recipe.saes, ranks)
    if ranks % nodes:
        raise UserError(f"{ranks} processes cannot be divided equally among {nodes} machines: choose --ranks as a "
                        "multiple of --nodes")
    read = {name: _model_read(recipe.of_model(name)) for name in ("", *recipe.models)}
    cost, d_model = read[""].cost, read[""].d_model
    costs = {name: one.cost for name, one in read.items() if one.cost is not None}
    all_known = len(costs) == len(read)
    gpu = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    compute_dtype = recipe.model.dtype
    if compute_dtype == "auto":  # every recent GPU has bfloat16
        compute_dtype = "bfloat16" if gpu else fast_dtype(torch.device("cpu"))
    tokens = recipe.tokens.count + recipe.tokens.held_out
    lengths = recipe.tokens.chunk_lengths
    mean_length = sum(low + high for low, high in lengths) / 2 / len(lengths)
    widths = {site: site_width(site, read[site.model].d_model, read[site.model].config)
              for site in recipe.activations.sites}
    row_bytes = {site: recipe.activations.row_bytes(width) for site, width in widths.items()}
    store_bytes = tokens * (sum(row_bytes.values()) + NORM_BYTES * len(row_bytes) + TOKEN_BYTES + ROW_BYTES)
    saes = [_plan_sae(recipe, sae, widths, gpu, ranks, ranks // nodes) for sae in recipe.saes]
    exports = sum(4 * sae.sae.d_sae * sum(_ends(sae.sae, widths)) for sae in saes)
    states = sum(sae.kept * sae.state_bytes for sae in saes) + max(sae.state_bytes for sae in saes)
    return Plan(
        recipe=recipe, d_model=d_model, compute_dtype=compute_dtype, gpu=gpu, shares=_shares(recipe),
        sequences=round(tokens / mean_length),
        segments=-(-tokens // recipe.tokens.segment_rows), store_bytes=store_bytes,
        site_bytes={site: tokens * each for site, each in row_bytes.items()},
        cost=cost,
        collect_flops=tokens * sum(each.flops_per_token(lengths) for each in costs.values()) if all_known else None,
        collect_memory=max((_collect_memory(recipe.of_model(name), compute_dtype, each, sum(
            row_bytes[site] for site in row_bytes if site.model == name), gpu) for name, each in costs.items()),
            key=lambda memory: memory.ram + memory.gpu) if all_known else None,
        saes=saes, disk_bytes=(0 if elsewhere or is_elsewhere(out) else store_bytes) + states + exports,
        present_bytes=present_bytes(out),
        free_bytes=shutil.disk_usage(nearest_folder(out)).free, rates=rates, ranks=ranks, nodes=nodes,
        warnings=[one.warning for one in read.values() if one.warning is not None] + _finish(saes, rates),
        verdict=_verdict(recipe, stores.values(), rates))


@dataclass(frozen=True)
class _ModelRead:
    """What is known, without its weights, about a model that a recipe reads."""

    d_model: int
    config: Any | None
    cost: ModelCost | None
    warning: str | None


def _model_read(recipe: Recipe) -> _ModelRead:
    """What is known about a recipe's model.

    Args:
        recipe: a recipe in which all sites are in this model (`Recipe.of_model`).
    """
    model, last = recipe.model, deepest(recipe.activations.sites)
    config = config_at_hand(model)
    if config is None:
        if model.d_model is None:
            raise UserError(f"the config of {model.name} is not in the hub's cache and the hub cannot be reached; set "
                            "model.d_model and model.num_layers in the recipe, so that the plan needs neither")
        to_fetch = not_fetched(model)
        return _ModelRead(model.d_model, None, None, to_fetch and f"The model is not here: {to_fetch}.")
    check_config(config, model, last)
    cost = model_cost(config, last, whole=base_of(model) is not None)
    return _ModelRead(cost.d_model, config, cost,
                      check_context(config, max(high for _, high in recipe.tokens.chunk_lengths), model.name))


def _finish(saes: list[SAEPlan], rates: Rates | None) -> list[str]:
    """A warning that the plan leaves out some of the cost of `train.finish`; none if no SAE has it."""
    tokens = sum(sae.finish_tokens for sae in saes)
    left_out = "neither its memory nor its time is" if rates is None else "its memory is not"
    return [f"train.finish: the whole language model reads {tokens:,.0f} tokens more while it trains, forward and "
            f"backward; {left_out} in these figures."] if tokens else []


def _verdict(recipe: Recipe, stores: Iterable[Path], rates: Rates | None) -> str:
    """What the probe (model/probe.py) showed about the model, if it ever ran; no weights are loaded here.

    Raises:
        UserError: the manifest of a store is damaged.
    """
    when, apart = "now", None if rates is None else rates.documents_apart
    for store in stores:
        if apart is None and (store / "manifest.json").exists():
            found = read_manifest(store)
            begun = recipe.model_copy(update={"model": recipe.model.model_copy(
                update={"dtype": found.model_dtype or "float32"})}) if recipe.model.dtype == "auto" else recipe
            settled_as = [begun] if begun.tokens.bos != "auto" else [begun.with_bos(bos) for bos in ("no", "yes")]
            if any(is_of(each, store, found) for each in settled_as):
                when, apart = f"when {store} was begun", found.documents_apart
    name = recipe.model.name + (f" --revision {recipe.model.revision}" if recipe.model.revision else "")
    if apart is None:
        return (f"The model has not been tried yet: `olmoscope model {name}` tries it with every command, --measure "
                "with collection.")
    return f"The model was tried {when}: it is causal, its rows can be collected, and " + (
        "it keeps documents apart where tokens.documents asks for that." if apart else
        "tokens.documents: apart does not work with it.")


def refuse_full_disk(plan: Plan, out: Path) -> None:
    """Refuse a run that does not fit on the disk.

    Raises:
        UserError: the disk lacks room.
    """
    if plan.missing_bytes:
        raise UserError(f"{out} needs {format_bytes(plan.disk_bytes - plan.present_bytes)} more, but the disk has "
                        f"{format_bytes(plan.free_bytes)} free; make room, choose another --out, or lower tokens.count")


def _shares(recipe: Recipe) -> dict[str, float] | None:
    mixture = recipe.text.mixture
    if mixture == "shards":
        return None
    return {name: weight / sum(mixture.values()) for name, weight in mixture.items()}


def _ends(sae: CoderConfig, widths: Mapping[Site, int]) -> tuple[int, int]:
    """The widths of what a coder reads and of what it writes."""
    d_in = sum(widths[site] for site in sae.reads)
    return d_in, d_in if sae.writes is None else widths[sae.writes[0]]


def _plan_sae(recipe: Recipe, sae: CoderConfig, widths: Mapping[Site, int], gpu: bool, ranks: int,
              node: int) -> SAEPlan:
    """The cost of one SAE.

    Args:
        ranks: how many processes train, `node` of them on each machine.
    """
    train = settled(recipe, sae)
    shared = team_size(ranks, train.shards)
    tokens, batch = recipe.tokens.count * train.epochs, train.batch
    d_in, d_out = _ends(sae, widths)
    parameters = sae.parameters(d_in, d_out)
    steps = -(-recipe.tokens.count // batch) * train.epochs
    kernels = kernels_for(torch.device("cuda" if gpu else "cpu"))
    whole, needed = (training_memory(recipe, sae, widths.__getitem__, kernels, count) for count in (1, shared))
    device = needed.held + needed.step
    row_bytes = sum(recipe.activations.row_bytes(widths[site]) for site in sae.sites)
    rounds = min(ROUND_ROWS, recipe.tokens.count) * row_bytes * ROUNDS_HELD
    ram = PROCESS_BYTES + rounds
    memory = Memory(ram + needed.state, device) if gpu else Memory(ram + device, 0)
    places = min(sae.d_sae, sae.k * (CAP if sae.activation in ("batchtopk", "jumprelu") else 1))
    team = first_of_ranks(shared, node)
    sent = step_traffic(batch, d_out, sae.d_sae, places, train.shards, team, sae.matryoshka,
                        selects=sae.activation != "groupmax")
    return SAEPlan(sae, parameters, whole.state, kept_checkpoints(train, steps), train,
                   rate_of(recipe, sae, d_in), steps, 2.0 * sae.d_sae * d_in * tokens, memory, shared, sent,
                   batch_traffic(batch, row_bytes, team), batch * row_bytes, recipe.tokens.count / sae.d_sae)


def _collect_memory(recipe: Recipe, compute_dtype: ComputeDtype, cost: ModelCost, row_bytes: int, gpu: bool) -> Memory:
    sites = len(recipe.activations.sites)
    each = PARAMETER_BYTES[compute_dtype]
    device = cost.parameters * each + cost.batch_bytes(recipe.tokens.batch_tokens, sites, each)
    segment = min(recipe.tokens.segment_rows, recipe.tokens.count) * row_bytes
    ram = PROCESS_BYTES + SEGMENTS_HELD * segment
    return Memory(ram, device + segment) if gpu else Memory(ram + device, 0)
