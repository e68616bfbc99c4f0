"""Make an index: corpus, sorted firings, parts, list, manifest. Each step does what is missing; the manifest comes
last. Several processes share the segments to encode, and the parts.

A killed process loses only the segment or part that it was working on. The finished index is the same, byte for byte.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmoscope.activations.store.reader import Store
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.distributed.ranks import Ranks
from olmoscope.errors import UserError
from olmoscope.features.corpus import corpus_of, write_corpus
from olmoscope.features.format import VERSION, IndexedFile, IndexedSAE, Info, Options, part_path, read_info
from olmoscope.features.listing import write_listing
from olmoscope.features.parts import checksum_path, gather_facts, make_parts, plan_parts
from olmoscope.features.read import FeatureIndex
from olmoscope.features.sorted_firings import Rows, SortedFirings, write_sorted_firings
from olmoscope.files import clean_temporary, locked, read_json, sha256, write_json
from olmoscope.model.unembed import NoUnembedding, Unembedding, load_unembedding
from olmoscope.model_source import at_revision
from olmoscope.progress import console
from olmoscope.provenance import provenance
from olmoscope.recipe.schema import Filter, Model
from olmoscope.sae.directions import unit_directions
from olmoscope.sae.io.opened import Opened
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.tokens.vocabulary import token_texts


@dataclass(frozen=True)
class IndexedText:
    """Where the rows to index come from."""

    identity: dict[str, str]
    """What decides the rows: `recipe_hash` and `split` of the store, and anything else that does."""
    open: Callable[[Path], Store]
    """Returns the store; the folder given has what was made for it."""
    make: Callable[[Path], object] | None = None
    """Makes what the store needs below a folder, or this process's share of it."""


@dataclass(frozen=True)
class Indexed:
    """What `build_index` did."""

    folder: Path
    info: Info
    fresh: bool
    """Whether it was made now. Otherwise it existed already, and its checksums are right."""


def build_index(subject: Opened, where: str, text: IndexedText, model: Model, out: Path, filter_: Filter,
                options: Options, device: torch.device, ranks: Ranks | None = None) -> Indexed:
    """Index an SAE over the rows of a store.

    Args:
        where: the address that opens the SAE: a hub id, or a folder.
        model: the language model; its name and revision must be those of the store.
        out: the folder of the index; files that are not the index's (labels) are left alone.
        ranks: the processes that share the work; each must call this, and all must see `out`. None: this one alone.

    Raises:
        UserError: the SAE does not belong to the store's model or sites, `out` holds another index, a file is damaged,
            or the disk is full.
    """
    identity = _identity(subject, text, model, filter_, options)
    ranks = ranks or Ranks.alone()
    with contextlib.ExitStack() as held:
        with ranks.agreed():
            if ranks.leads:
                held.enter_context(locked(out, "indexing"))
        if ranks.ask((out / "manifest.json").exists())[0]:
            with ranks.agreed():
                return _there_already(out, identity) if ranks.leads else Indexed(out, read_info(out), fresh=False)
        with ranks.agreed():
            if ranks.leads:
                _begin(out, identity)
        with ranks.agreed():
            if text.make is not None:
                text.make(out / "work")
        with ranks.agreed():
            store = text.open(out / "work")
            _refuse_other_rows(subject, store, model)
        info = _make(subject, where, store, model, out, filter_, options, device, text, identity, ranks)
        with ranks.agreed():
            if info is not None:
                write_json(out / "manifest.json", info.model_dump(mode="json"))
        with ranks.agreed():  # no process has a file in work/ open any more
            if ranks.leads:
                shutil.rmtree(out / "work")
        return Indexed(out, info or read_info(out), fresh=True)


def _identity(subject: Opened, text: IndexedText, model: Model, filter_: Filter, options: Options) -> str:
    value = {"version": VERSION, "sae": subject.identity, **_place(subject.site), "text": text.identity,
             "model": model.model_dump(mode="json", include={"name", "revision"}),
             "filter": filter_.model_dump(mode="json"), "options": options.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _place(site: Site) -> dict[str, Any]:
    """A site in identities: a residual stream by its layer, as before there were sites."""
    return {"layer": site.layer} if site.is_layer_output else {"site": str(site)}


def _there_already(out: Path, identity: str) -> Indexed:
    info = read_info(out)
    if info.identity != identity:
        raise UserError(f"{out} holds another index (of {info.sae.name}, or of other rows or options); choose another "
                        "--out or delete it")
    FeatureIndex(out).verify()
    if (out / "work").exists():  # the process that finished it was killed before it tidied up
        shutil.rmtree(out / "work")
    return Indexed(out, info, fresh=False)


def _begin(out: Path, identity: str) -> None:
    """Record which index this becomes; refuse the leftovers of another one that was never finished."""
    clean_temporary(out)
    path = out / "work" / "identity.json"
    if path.exists() and read_json(path) != {"identity": identity}:
        raise UserError(f"{out} holds the beginning of another index (of another SAE, other rows or options); choose "
                        f"another --out or delete {out / 'work'}")
    write_json(path, {"identity": identity})


def _refuse_other_rows(subject: Opened, store: Store, model: Model) -> None:
    manifest = store.manifest
    if model.name != manifest.model.name:
        raise UserError(f"{subject.name} is of model {model.name}, {store.path} has rows of {manifest.model.name}; "
                        "give another --store, or --model if these are two names of one model")
    for site in subject.reads:
        if site not in manifest.sites:
            raise UserError(f"{store.path} has no rows of {site}, which {subject.name} reads; it has "
                            f"{', '.join(map(str, manifest.sites))}")
    width = sum(manifest.width(site) for site in subject.reads)
    if subject.sae.d_in != width:
        raise UserError(f"{subject.name} reads rows of width {subject.sae.d_in}, those of {store.path} have {width}")
    if subject.kind == "run" and subject.model_revision != manifest.model.revision:
        raise UserError(f"{subject.name} was trained on revision {subject.model_revision} of {model.name}, "
                        f"{store.path} is of revision {manifest.model.revision}")


def _make(subject: Opened, where: str, store: Store, model: Model, out: Path, filter_: Filter, options: Options,
          device: torch.device, text: IndexedText, identity: str, ranks: Ranks) -> Info | None:
    """Everything except the manifest, which the first rank gets."""
    work, manifest, sae = out / "work", store.manifest, subject.sae.to(device)
    with ranks.agreed():
        unembedding, why_none = _load_unembedding(store, model, device)
        if not subject.site.in_stream:
            unembedding, why_none = None, f"what is written at {subject.site} does not go into the residual stream"
        texts = token_texts(load_tokenizer(at_revision(model, manifest.model.revision), "no").backend)
        kept = keep_of_store(filter_, store, subject.reads)
        corpus, rows_at = corpus_of(store, kept.masks)
        texts += [""] * (int(corpus.tokens_T.max()) + 1 - len(texts))
        unembedding = None if unembedding is None else unembedding.of_first(len(texts))
        if ranks.leads:
            write_corpus(out / "corpus", corpus, texts)
        write_sorted_firings(sae, Rows(store, subject.reads, kept.masks, rows_at), work, ranks)

    with ranks.agreed():
        fired = SortedFirings(work, manifest.segments)
        parts = plan_parts(fired.counts())
        # A crosscoder's directions at its main site promote tokens; its directions at all sites decide the neighbours.
        main_FD = sae.W_dec
        if len(subject.writes) > 1:
            before = sum(manifest.width(site) for site in subject.writes[: subject.writes.index(subject.site)])
            main_FD = sae.W_dec[:, before : before + manifest.width(subject.site)]
        facts = gather_facts(corpus, len(manifest.sources), fired, main_FD, unit_directions(sae.W_dec), unembedding,
                             len(texts), options)
        make_parts(out, work, parts, fired, facts, ranks)
    if not ranks.leads:
        return None
    source_rows = dict(zip(manifest.sources, facts.source_rows_X.tolist(), strict=True))
    write_listing(out, parts, texts, source_rows)

    evaluation = subject.folder / "evaluation.json"
    return Info(
        identity=identity,
        sae=IndexedSAE(name=subject.name, site=subject.site,
                       reads=list(subject.reads) if subject.reads != (subject.site,) else None,
                       d_model=sae.d_model, d_sae=sae.d_sae,
                       kind=subject.kind, architecture=subject.architecture, weights=subject.identity,
                       where=where if subject.kind == "hub" else os.path.relpath(Path(where).resolve(), out.resolve())),
        model=manifest.model, model_dtype=manifest.model_dtype,
        store={**text.identity, "tokenizer_hash": manifest.tokenizer_hash}
        | ({"bos_token_ids": manifest.bos_token_ids} if manifest.bos_token_ids else {}),
        filter=filter_, options=options, tokens=len(corpus.tokens_T), rows=facts.rows,
        sequences=len(corpus.sequences_S1) - 1, documents=len(set(corpus.document_ids_N.tolist())),
        firings=int(fired.counts().sum()), dead=int((fired.counts() == 0).sum()),
        sample_rows=len(facts.starts_R1) - 1, sources=source_rows,
        position_rows=facts.position_rows_L.tolist(), unembedding=None if unembedding is None else str(unembedding),
        no_unembedding=why_none, parts=parts,
        # The figures beside a run belong to its last checkpoint, not to earlier ones.
        evaluation=read_json(evaluation) if subject.step is None and evaluation.exists() else None,
        files=_files(out, work, len(parts) - 1), provenance=provenance(dated=False))


def _load_unembedding(store: Store, model: Model, device: torch.device) -> tuple[Unembedding | None, str | None]:
    """The final norm and unembedding of exactly the model that the store comes from; or None, and why there is none."""
    revision = store.manifest.model.revision
    wanted = at_revision(model, revision).model_copy(update={"dtype": "float32"})
    try:
        unembedding = load_unembedding(wanted, device)
    except NoUnembedding as error:
        console.print(f"note: the index has no promoted tokens: {error}", soft_wrap=True, highlight=False, markup=False)
        return None, str(error)
    if unembedding.revision != revision:
        raise UserError(f"the weights of {model.name} have changed since {store.path} was collected (revision "
                        f"{unembedding.revision}, not {revision})")
    return unembedding, None


def _files(out: Path, work: Path, parts: int) -> dict[str, IndexedFile]:
    """Size and checksum of every file; those of the parts were computed when the parts were written."""
    names = [*(f"corpus/{name}" for name in ("tokens.npy", "sequences.npy", "kept.npy", "documents.parquet",
                                             "vocabulary.parquet")), "features.parquet"]
    files = {name: IndexedFile(sha256=sha256(out / name), bytes=(out / name).stat().st_size) for name in names}
    for part in range(parts):
        written: dict[str, Any] = read_json(checksum_path(work, part))
        files[str(part_path(out, part).relative_to(out))] = IndexedFile(**written)
    return files
