"""Whether olmoscope reads a model correctly: its commands compared with plain transformers and forward hooks.

Four commands run on one small model (small_models.py), at a middle layer and at the last:

    collect         rows of a store equal those of each sequence alone, though batches are padded
    collect apart   the same with `tokens.documents: apart`: rows equal those of each document alone
    evaluate        cross-entropy and KL of a random SAE equal those of a hook that puts its reconstruction there
    index           an index of that SAE over a text is made, and its checksums are right

Each result is right, refused (one line, before anything is packed) or wrong. Shapes: T positions, D d_model, V
vocabulary.
"""

import builtins
import json
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.features.read import FeatureIndex
from olmoscope.features.rows_of import index_sae
from olmoscope.recipe.schema import Recipe
from olmoscope.sae.io import saelens
from olmoscope.sae.threshold import JumpReLU
from olmoscope.site import Site
from olmoscope.tokens.segments import read_token_segment
from small_model_sizes import MUST_REFUSE
from small_models import LAYERS, layers_path

MIDDLE, LAST = LAYERS // 2 - 1, LAYERS - 1
TOKENS = 500
CLOSE = 2e-4
"""Largest relative difference in a row or a figure that float32 arithmetic in batches of other shapes may cause."""
COMMANDS = ("collect", "collect apart", "evaluate", "index")


@dataclass(frozen=True)
class Finding:
    """The result of a command on a model."""

    state: Literal["right", "refused", "wrong"]
    reason: str = ""
    """The line of a refusal, or what was wrong."""


class Differs(Exception):
    """The package's values differ from the plain model's."""


class PlainModel:
    """A causal LM as transformers loads it, with hooks for the outputs of its layers."""

    def __init__(self, folder: Path, path: str) -> None:
        """
        Args:
            path: the path of the list of decoder layers in the whole model.
        """
        self.module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.layers: nn.ModuleList = self.module.get_submodule(path)
        assert len(self.layers) == LAYERS, (path, len(self.layers))

    @torch.no_grad()
    def rows(self, token_ids: np.ndarray, layers: tuple[int, ...]) -> dict[int, Tensor]:
        """The outputs of layers for one sequence without padding, `[T, D]` each.

        Raises:
            Differs: an output is not one row per token.
        """
        found: dict[int, Tensor] = {}
        handles = [self.layers[layer].register_forward_hook(
            lambda module, inputs, output, layer=layer: found.update({layer: _stream(output)})) for layer in layers]
        self.module(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for layer, output in found.items():
            if output.dim() != 3 or output.shape[:2] != (1, len(token_ids)):
                raise Differs(f"layer {layer} gives {list(output.shape)} for {len(token_ids)} tokens: these are not "
                              "rows, but the model was not refused")
        return {layer: output[0] for layer, output in found.items()}

    def width(self) -> int:
        """d_model; the embedding may be narrower."""
        return int(self.module.config.get_text_config().hidden_size)

    @torch.no_grad()
    def log_probabilities(self, token_ids: np.ndarray, layer: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Log-probabilities of the next token, `[T, V]` float64, with a layer's output changed by `change`."""
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            changed = change(_stream(output))
            return type(output)((changed, *output[1:])) if isinstance(output, (tuple, list)) else changed

        handle = self.layers[layer].register_forward_hook(hook)
        logits = self.module(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None], use_cache=False).logits[0]
        handle.remove()
        return torch.log_softmax(logits.double(), dim=1)


def _stream(output: Any) -> Tensor:
    """The residual stream in the return value of a decoder layer."""
    stream = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(stream, Tensor)
    return stream


def check(family: str, model: Path, work: Path) -> dict[str, Finding]:
    """Try all commands.

    Args:
        model: a folder written by `make_model` for the family.
        work: a folder to create.

    Returns:
        A finding for each of COMMANDS.
    """
    work.mkdir()
    text = write_text(work / "text.jsonl")
    plain = None if family in MUST_REFUSE else PlainModel(model, layers_path(family))
    d_model = 64 if plain is None else plain.width()
    found = {
        "collect": finding_of(lambda: _check_rows(plain, model, text, work / "share", "share"), work / "share"),
        "collect apart": finding_of(lambda: _check_rows(plain, model, text, work / "apart", "apart"), work / "apart"),
        "evaluate": finding_of(lambda: _check_figures(plain, model, text, work, d_model), work / "evaluation"),
        "index": finding_of(lambda: _check_index(model, text, work, d_model), work / "index")}
    found = {command: replace(finding, reason=finding.reason.replace(str(model), "MODEL"))
             for command, finding in found.items()}
    if plain is None:
        accepted = Finding("wrong", f"not refused: {MUST_REFUSE[family]}")
        return {command: accepted if finding.state == "right" else finding for command, finding in found.items()}
    return found


def finding_of(command: Callable[[], None], out: Path) -> Finding:
    """Run a command and its comparison.

    Args:
        out: where it writes.
    """
    try:
        command()
    except UserError as error:
        line = str(error)
        if "\n" in line:
            return Finding("wrong", f"refused in several lines: {line}")
        if any(path.name == "tokens" for path in out.rglob("*")):
            return Finding("wrong", f"refused only after packing: {line}")
        return Finding("refused", line)
    except Differs as error:
        return Finding("wrong", str(error))
    except Exception as error:  # noqa: BLE001  (any error is a finding)
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = " ".join(str(error).split())[:300]
        return Finding("wrong", f"{type(error).__name__}: {line} ({Path(where.filename).name}:{where.lineno})")
    return Finding("right")


def write_text(path: Path) -> Path:
    """Documents of 5 to 60 words."""
    draw = random.Random(0)
    words = [word for word in dir(builtins) if not word.startswith("_")]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(60)]
    path.write_text("".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)))
    return path


def _check_rows(plain: PlainModel | None, model: Path, text: Path, store: Path, documents: str) -> None:
    """Collect, and compare every row with the plain model's."""
    recipe = Recipe.model_validate({
        "name": "architectures", "device": "cpu",
        "text": {"sources": [{"kind": "dolma", "name": "text", "paths": [str(text)]}], "mixture": {"text": 1.0}},
        "tokens": {"count": TOKENS, "held_out": 1, "chunk_lengths": [(20, 60), (80, 120)], "segment_rows": 1024,
                   "batch_tokens": 256, "max_padding": 0.5, "documents": documents},
        "model": {"name": str(model), "dtype": "float32"},
        "activations": {"layers": [MIDDLE, LAST], "dtype": "float32"},
        "saes": [{"layer": MIDDLE, "d_sae": 64, "k": 1}], "train": {},
        "release": {"name": "none", "repo_id": "none/none"}})
    collected = collect(recipe, "train", store)
    assert collected.padding > 0, "the text has no batch with padding"
    opened, packed = open_store(store), read_token_segment(store, 0)
    if plain is None:
        return
    facts = opened.read_rows(0)
    starts = dict(zip(packed.sequence_numbers.tolist(), packed.sequence_starts[:-1].tolist(), strict=True))
    place_R = torch.tensor([starts[sequence] for sequence in facts["sequence"].tolist()]) + facts["position"]
    cuts = set(packed.sequence_starts.tolist())
    if documents == "apart":
        cuts |= set((np.flatnonzero(np.diff(packed.document_ids)) + 1).tolist())
    wanted: dict[int, list[Tensor]] = {MIDDLE: [], LAST: []}
    for start, end in pairwise(sorted(cuts)):
        for layer, rows_TD in plain.rows(packed.token_ids[start:end], (MIDDLE, LAST)).items():
            wanted[layer].append(rows_TD)
    for layer, parts in wanted.items():
        _compare(opened.read(Site(layer), 0, slice(0, opened.rows)), torch.cat(parts)[place_R],
                 f"rows of layer {layer}")


def _compare(found_RD: Tensor, wanted_RD: Tensor, what: str) -> None:
    if found_RD.shape != wanted_RD.shape:
        raise Differs(f"{what}: {list(found_RD.shape)}, not {list(wanted_RD.shape)}")
    off_R = (found_RD - wanted_RD).norm(dim=1) / wanted_RD.norm(dim=1)
    if not (off_R < CLOSE).all():
        raise Differs(f"{what}: {int((~(off_R < CLOSE)).sum())} of {len(off_R)} differ, by up to "
                      f"{float(off_R.nan_to_num(torch.inf).max()):.3g} of their norm")


def write_sae(folder: Path, model: Path, layer: int, d_model: int) -> Tensor:
    """A random tied SAE in SAELens' format with as many latents as channels; returns its decoder `[D, D]`."""
    W_FD = nn.functional.normalize(torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(0)), dim=1)
    zeros_D = torch.zeros(d_model)
    metadata = {"model_name": str(model), "hook_name": f"blocks.{layer}.hook_resid_post", "hf_hook_name": None,
                "prepend_bos": False, "context_size": 64}
    saelens.write(JumpReLU(W_FD, W_FD, zeros_D, "none", zeros_D.clone(), zeros_D.clone()), folder, metadata)
    return W_FD


def _check_figures(plain: PlainModel | None, model: Path, text: Path, work: Path, d_model: int) -> None:
    """Evaluate an SAE of each layer, and compare cross-entropies and KL with a plain splice."""
    out, layers = work / "evaluation", (MIDDLE, LAST)
    W_FD = {layer: write_sae(work / f"sae-{layer}", model, layer, d_model) for layer in layers}
    evaluated = evaluate_anywhere([str(work / f"sae-{layer}") for layer in layers],
                                  Options(out, str(text), TOKENS, dtype="float32", batch_tokens=256))
    if plain is None:
        return
    packed = read_token_segment(next((out / "text").rglob("tokens")).parent, 0)
    for layer, one in zip(layers, evaluated, strict=True):
        language = read_evaluation(one.folder / EVALUATION).language
        assert language is not None
        wanted = _spliced(plain, packed.token_ids, packed.sequence_starts, layer, W_FD[layer])
        for name, value in wanted.items():
            found = getattr(language, name)
            if abs(found - value) > CLOSE * 10 * max(abs(value), 1e-3):
                raise Differs(f"{name} of layer {layer}: {found:.6g}, not {value:.6g}")


def _spliced(plain: PlainModel, token_ids: np.ndarray, starts: np.ndarray, layer: int,
             W_FD: Tensor) -> dict[str, float]:
    """Means over all tokens (KL) or over those with a next one in their sequence (cross-entropies)."""
    sums, tokens = dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "kl", "kl_zero"), 0.0), 0
    for start, end in pairwise(starts.tolist()):
        sequence = token_ids[start:end]
        clean_TV = plain.log_probabilities(sequence, layer, lambda x: x)
        next_T1 = torch.from_numpy(sequence[1:].astype(np.int64))[:, None]
        sums["ce_clean"] -= float(clean_TV[:-1].gather(1, next_T1).sum())
        for name, change in (("spliced", lambda x: torch.relu(x @ W_FD.T) @ W_FD), ("zero", torch.zeros_like)):
            other_TV = plain.log_probabilities(sequence, layer, change)
            sums[f"ce_{name}"] -= float(other_TV[:-1].gather(1, next_T1).sum())
            sums["kl" if name == "spliced" else "kl_zero"] += float((clean_TV.exp() * (clean_TV - other_TV)).sum())
        tokens += len(sequence)
    predictions = tokens - (len(starts) - 1)
    return {name: value / (predictions if name.startswith("ce") else tokens) for name, value in sums.items()}


def _check_index(model: Path, text: Path, work: Path, d_model: int) -> None:
    sae = work / "sae-of-index"
    write_sae(sae, model, MIDDLE, d_model)
    indexed = index_sae(str(sae), text=str(text), out=work / "index", tokens=TOKENS, device="cpu")
    FeatureIndex(indexed.folder).verify()
    if indexed.info.rows != TOKENS or not indexed.info.firings:
        raise Differs(f"index: {indexed.info.rows} rows with {indexed.info.firings} firings, of {TOKENS} tokens")
