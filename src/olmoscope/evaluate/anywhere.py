"""`olmoscope evaluate SAE...`: SAEs from anywhere, on a text that their language models read now.

    OUT/NAME/evaluation.json        for each SAE; NAME is its name, with characters replaced that file names cannot have
    OUT/text/MODEL/HASH/tokens/     the text, as MODEL's tokenizer sees it (MODEL_COMMIT for a model from the hub); HASH
                                    depends on its content and on how it is cut

All SAEs of one language model are measured in one pass, on the same tokens.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.place import is_elsewhere, store_folder
from olmoscope.distributed.launch import World
from olmoscope.errors import UserError
from olmoscope.evaluate.behaviour import NOTHING_MORE, Behaviour, measure_behaviour
from olmoscope.evaluate.evaluate import Setting, evaluate_on_text, forget_unfinished, identity
from olmoscope.evaluate.probing import Probed
from olmoscope.evaluate.results import EVALUATION, is_evaluated, write_evaluation
from olmoscope.evaluate.sequences import Sequences, read_sequences
from olmoscope.files import locked
from olmoscope.model.config import read_config
from olmoscope.model.dtype import settle_model
from olmoscope.model.load import pick_device
from olmoscope.model.splice import load_causal_lm
from olmoscope.model_adapter import PAIR
from olmoscope.model_source import at_revision, is_local, pinned, revision_of
from olmoscope.progress import console
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import Model, TokensRecipe
from olmoscope.sae.io.context import chosen_bos, text_context, warn_of_context
from olmoscope.sae.io.open import find_saes, open_sae
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.same_model import GivenModel, refuse_misfit, refuse_uncentred, said_by, take_for_same
from olmoscope.site import Site
from olmoscope.text.given import given_text
from olmoscope.tokens.pack import is_packed, pack
from olmoscope.tokens.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        out: where results go.
        text: a file, a folder, a hub dataset, or an output folder (its held-out text). None: the held-out text of the
            output folder that one of the SAEs is in.
        tokens: the most tokens of the text to use.
        model: the language model of all SAEs, if they do not name it, or if a copy of it is elsewhere.
        dtype: the dtype in which it computes.
        site: the site, for SAEs that do not say.
        batch_tokens: tokens in one pass of the model.
        bos: whether sequences begin with BOS, for SAEs that do not say. None: as the SAEs were trained.
        behaviour: what else to measure.
    """

    out: Path
    text: str | None = None
    tokens: int = 100_000
    model: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    site: Site | None = None
    batch_tokens: int = 16384
    bos: bool | None = None
    behaviour: Behaviour = NOTHING_MORE


@dataclass(frozen=True)
class Evaluated:
    """One SAE's result."""

    name: str
    folder: Path
    fresh: bool
    """False if it existed already."""


def evaluate_anywhere(names: Sequence[str], options: Options,
                      world: World = World()) -> list[Evaluated]:  # noqa: B008 (frozen)
    """Evaluate SAEs, except those that were evaluated before.

    Args:
        names: see `find_saes`.
        world: the processes that share the work, each of which must call this; the first writes.

    Raises:
        UserError: an SAE, a model or a text cannot be loaded, or they do not fit each other.
    """
    done: dict[str, Evaluated] = {}
    device = pick_device("auto", world.place.local_index)
    with contextlib.ExitStack() as held:
        with world.ranks.agreed():
            subjects = subjects_of(names, options)
            text = options.text or nearby_text(subjects)
            groups = by_model(subjects, options, device)
            if world.ranks.leads:
                held.enter_context(locked(options.out, "evaluating"))
        for model, group in groups:
            done |= {one.name: one for one in _evaluate_group(group, model, text, options, world, device)}
    return [done[subject.name] for subject in subjects]


def subjects_of(names: Sequence[str], options: Options) -> list[Opened]:
    """Open SAEs, and settle the name and the language model of each.

    Args:
        names: see `find_saes`.

    Raises:
        UserError: an SAE cannot be opened, was named twice, or states no model or another one than `options.model`.
    """
    places = [place for name in names for place in find_saes(name)]
    subjects = [open_sae(place, options.site) for place in places]
    called = [subject.name for subject in subjects]
    given = None if options.model is None else GivenModel(options.model)
    found = []
    for place, subject in zip(places, subjects, strict=True):
        model = options.model or subject.model_name
        if model is None:
            others = sorted({one.model_name for one in subjects if one.model_name})
            raise UserError(f"{place} does not name its language model; give --model" + (
                f", and evaluate it separately from those of {', '.join(others)}" if others else ""))
        if note := subject.unread_note():
            console.print(note, soft_wrap=True, highlight=False, markup=False)
        said = said_by(subject)
        if given is not None and said is not None and (note := take_for_same(subject.name, said, given)):
            console.print(note, soft_wrap=True, highlight=False, markup=False)
        name = subject.name if called.count(subject.name) == 1 else place.strip("/")
        found.append(replace(subject, name=name, model_name=model,
                             model_revision=subject.model_revision if model == subject.model_name else None))
    folders = [_slug(subject.name) for subject in found]
    for subject, folder in zip(found, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"{subject.name} was named twice; name each SAE once")
    return found


def by_model(subjects: Sequence[Opened], options: Options, device: torch.device) -> list[tuple[Model, list[Opened]]]:
    """SAEs by their language model, which is pinned. All are checked before the first model reads anything.

    Raises:
        UserError: a model cannot be loaded, or an SAE does not fit its model.
    """
    found = []
    for (name, revision), group in groupby(sorted(subjects, key=lambda subject: str(model_of(subject))), key=model_of):
        model = pinned(settle_model(Model(name=name, revision=revision, dtype=options.dtype), device))
        found.append((model, list(group)))
        refuse_unfit(found[-1][1], model)
        _tokenizer(found[-1][1], model, options)
    return found


def model_of(subject: Opened) -> tuple[str, str | None]:
    """The model's name and, if it is on the hub, the commit, branch or tag that the SAE was trained on."""
    name, revision = str(subject.model_name), subject.model_revision
    if PAIR.fullmatch(revision or ""):
        return name, at_revision(Model(name=name), revision).revision
    return name, None if is_local(Model(name=name)) or str(revision).startswith("sha256:") else revision


def _evaluate_group(subjects: list[Opened], model: Model, text: str, options: Options, world: World,
                    device: torch.device) -> Iterator[Evaluated]:
    """Evaluate all SAEs of one language model."""
    ranks = world.ranks
    with ranks.agreed():
        revision = revision_of(model)
        sites = sorted({site for subject in subjects for site in (*subject.reads, *subject.writes)})
        whole = cache(lambda: load_causal_lm(model, device, sites))
        if ranks.leads:  # packs the text
            sequences_of(subjects, model, text, options, whole)
    with ranks.agreed():
        sequences = sequences_of(subjects, model, text, options, whole).first(options.tokens)
        setting = Setting(sequences, sequences.rows, options.batch_tokens,
                          Path(text).name if Path(text).exists() else text, model.dtype, options.out, ranks=ranks)
        paths = [options.out / _slug(subject.name) / EVALUATION for subject in subjects]
        pending = [number for number, subject in enumerate(subjects)
                   if not is_evaluated(paths[number], identity(subject, revision, setting))]
        if pending:
            whole()
    found = evaluate_on_text([subjects[number] for number in pending], whole(), setting) if pending else []
    with ranks.agreed():  # the first rank continues alone, and reports how that went
        if ranks.leads:
            for number, evaluation in zip(pending, found, strict=True):
                write_evaluation(paths[number], evaluation)
            if pending:
                forget_unfinished(options.out)
            if options.behaviour != NOTHING_MORE:
                whole.cache_clear()  # the next measurement loads less of the model
                measure_behaviour(
                    [Probed(subject, path.parent) for subject, path in zip(subjects, paths, strict=True)], model,
                    _tokenizer(subjects, model, options), options.batch_tokens, device, options.behaviour)
    for number, subject in enumerate(subjects):
        yield Evaluated(subject.name, paths[number].parent, number in pending)


def refuse_unfit(subjects: Sequence[Opened], model: Model) -> None:
    """Refuse SAEs that do not fit a language model that reads a text now.

    Raises:
        UserError: one also reads other models, or reads rows without their mean, rows of another width, or a layer that
            the model does not have.
    """
    config = read_config(model)
    for subject in subjects:
        if others := sorted({site.model for site in subject.reads if site.model}):
            raise UserError(f"{subject.name} reads other models too ({', '.join(others)}), but only one model reads a "
                            "text: evaluate it with its output folder")
        refuse_uncentred(subject, model)
        refuse_misfit(subject, model, config)


def sequences_of(subjects: Sequence[Opened], model: Model, text: str, options: Options,
                 whole: Callable[[], object]) -> Sequences:
    """The tokens of the text, as this model reads them.

    Args:
        whole: returns the model; called before anything is packed, so that an unreadable model is refused at once.
    """
    tokenizer = _tokenizer(subjects, model, options)
    if (Path(text) / "recipe.yaml").is_file():
        return _held_out(Path(text), tokenizer, model)
    length = text_context(subjects, model)
    packing = TokensRecipe.model_validate({
        "text": given_text(text, model),
        "tokens": {"count": options.tokens, "held_out": 1, "chunk_lengths": [(length, length)],
                   "bos": "yes" if tokenizer.begin else "no",
                   "segment_rows": max(65536, length), "batch_tokens": max(16384, length)},
        "model": model})
    # Different commits may have different tokenizers.
    called = _slug(model.name if model.revision is None else f"{model.name}_{model.revision}")
    folder = options.out / "text" / called / packing.tokens_hash()
    if not is_packed(folder):
        whole()
    pack(packing, tokenizer, "train", folder)
    return read_sequences(folder, tokenizer, apart=False, stored=tokenizer.begin)


def _held_out(out: Path, tokenizer: Tokenizer, model: Model) -> Sequences:
    """The held-out tokens of an output folder."""
    store = store_folder(out, "held_out")
    if not (store / "tokens" / "index.json").exists():
        raise UserError(f"{out} has no held-out tokens yet; run `olmoscope collect {out}` first, or give --text")
    manifest = read_manifest(store)
    if manifest.tokenizer_hash != tokenizer.hash():
        raise UserError(f"the held-out tokens of {out} come from another tokenizer than {model.name}'s; give --text")
    apart = load_recipe(str(out / "recipe.yaml")).tokens.documents == "apart"
    sequences = read_sequences(store, tokenizer, apart=apart, stored=tuple(manifest.bos_token_ids))
    warn_of_context(read_config(model), int(np.diff(sequences.starts).max()), model)
    return sequences


def _tokenizer(subjects: Sequence[Opened], model: Model, options: Options) -> Tokenizer:
    """The model's tokenizer, with the beginning of sequences that these SAEs were trained with."""
    said = {chosen_bos(subject, options.bos): subject.name for subject in subjects}
    if {"yes", "no"} <= said.keys():
        raise UserError(f"{said['yes']} was trained on sequences that begin with BOS, {said['no']} on sequences "
                        "without it; evaluate them separately")
    found = {bos: load_tokenizer(model, bos) for bos in said}
    if len({tokenizer.begin for tokenizer in found.values()}) != 1:
        raise UserError(f"{said['auto']} does not say whether its sequences begin with BOS, and the tokenizer of "
                        f"{model.name} begins them in another way than the other SAEs say; evaluate it separately")
    return next(iter(found.values()))


def nearby_text(subjects: Sequence[Opened]) -> str:
    for subject in subjects:
        for folder in subject.folder.resolve().parents:
            if subject.kind == "run" and (is_elsewhere(folder) or (folder / "store" / "held_out").is_dir()):
                return str(folder)
    raise UserError("none of these SAEs is in an output folder with held-out text; give --text")


def _slug(name: str) -> str:
    """A name as the name of a single folder."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "sae"
