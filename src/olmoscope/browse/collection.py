"""The indexes that a page shows, each with its labels and its SAE; several may share a language model."""

import re
import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from olmoscope.browse.language_model import LiveModel
from olmoscope.errors import UserError
from olmoscope.features.format import sae_place
from olmoscope.features.labels import LABELS_FILE, Entry, Labels
from olmoscope.features.read import FeatureIndex, find_indexes
from olmoscope.features.records import Page
from olmoscope.features.table import Filters, Sort
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposal, Proposals
from olmoscope.labelling.scores import Figure
from olmoscope.model.load import pick_device
from olmoscope.model_source import at_revision
from olmoscope.progress import console
from olmoscope.recipe.schema import Model
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io.same_model import GivenModel, SaidModel, take_for_same


@dataclass
class Shown:
    """One index, with all that the page needs."""

    slug: str
    """Its name in addresses."""
    index: FeatureIndex
    labels: Labels
    live: LiveModel
    _newest: dict[int, Entry] = field(default_factory=dict)
    _seen: int = 0
    _sae: SparseCoder | None = None
    _proposals: Proposals | None = None
    _best: tuple[tuple[int, int], dict[int, Proposal]] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def newest_labels(self) -> dict[int, Entry]:
        """The entry that counts for each feature with a label or a note; reads only what is new since the last
        call."""
        with self._lock:
            for entry in self.labels.since(self._seen):
                self._seen = entry.id
                if entry.label or entry.note:
                    self._newest[entry.feature] = entry
                else:
                    self._newest.pop(entry.feature, None)
            return dict(self._newest)

    @property
    def proposals(self) -> Proposals | None:
        """What programs say; None until `olmoscope label` has written something."""
        with self._lock:
            path = self.index.path / PROPOSALS_FILE
            if self._proposals is None and path.exists():
                self._proposals = Proposals(path, self.index.info.sae.d_sae)
            return self._proposals

    def best_proposals(self) -> dict[int, Proposal]:
        """The best proposal for each feature that has one; read again whenever the file has changed."""
        proposals = self.proposals
        if proposals is None:
            return {}
        changes = proposals.changes()
        if self._best is None or self._best[0] != changes:
            self._best = changes, proposals.best()
        return self._best[1]

    def label_texts(self) -> dict[int, str]:
        """The label that counts for each feature that has one: what a person wrote, else the best proposal."""
        proposed = {number: one.label for number, one in self.best_proposals().items()}
        return proposed | {number: entry.label for number, entry in self.newest_labels().items() if entry.label}

    def label_figures(self) -> dict[int, tuple[Figure, str]]:
        """The detection AUROC of the best proposal for each feature, and who proposes it.

        Features whose AUROC is unknown, and those that a person has labelled, are left out.
        """
        written = {number for number, entry in self.newest_labels().items() if entry.label}
        return {number: (one.scores.detection, one.labeller) for number, one in self.best_proposals().items()
                if one.scores.detection is not None and number not in written}

    @property
    def begin(self) -> list[int]:
        """Token ids that a prompt begins with, like the sequences of the index."""
        return list(self.index.info.store.get("bos_token_ids", []))

    @cached_property
    def densities(self) -> np.ndarray:
        """The density of each feature."""
        table = pq.read_table(self.index.path / "features.parquet", columns=["density"])
        density: np.ndarray = table["density"].to_numpy()
        return density

    def sae(self) -> SparseCoder:
        """The SAE itself, loaded when it is first needed, on the model's device.

        Raises:
            UserError: it cannot be opened.
        """
        from olmoscope.sae.io.open import open_sae

        with self._lock:
            if self._sae is None:
                info = self.index.info
                self._sae = open_sae(sae_place(self.index.path, info), info.sae.site).sae.to(pick_device("auto"))
            return self._sae


@dataclass(frozen=True)
class Listing:
    """Which features, in which order, as the address of a list says."""

    sort: Sort
    descending: bool
    filters: Filters
    search: str
    labelled: bool | None
    min_score: float | None = None

    def _arguments(self, shown: Shown) -> dict[str, Any]:
        filters = self.filters
        if self.labelled is not None:
            labelled = np.array(sorted(shown.label_texts()), dtype=np.int64)
            filters = replace(filters, among=labelled) if self.labelled else replace(filters, besides=labelled)
        scores: dict[int, float] = {}
        if self.sort == "score" or self.min_score is not None:
            scores = {number: figure.value for number, (figure, _) in shown.label_figures().items()}
        if (least := self.min_score) is not None:
            good = [number for number, score in scores.items() if score >= least]
            filters = replace(filters, among=good if filters.among is None else np.intersect1d(filters.among, good))
        also: list[int] = []
        if self.search:
            also = shown.labels.search(self.search)
            if (proposals := shown.proposals) is not None:
                also = sorted({*also, *proposals.search(self.search)})
        return {"sort": self.sort, "descending": self.descending, "filters": filters, "search": self.search,
                "also": also, "scores": scores}

    def page(self, shown: Shown, offset: int, limit: int) -> Page:
        """Some lines of the list."""
        return shown.index.table(**self._arguments(shown), offset=offset, limit=limit)

    def order(self, shown: Shown) -> np.ndarray:
        """All features of the list, in order."""
        return shown.index.order(**self._arguments(shown))


def open_collection(folder: Path, model: str | None) -> dict[str, Shown]:
    """Open every index in or below a folder, in the order of their paths.

    Args:
        model: where the model that the indexes name is now: a hub repository, a folder, or `tiny`.

    Raises:
        UserError: there is no index, one is damaged, or the model cannot be loaded or is another one.
    """
    collection: dict[str, Shown] = {}
    models: dict[str, LiveModel] = {}
    given = None if model is None else GivenModel(model)
    for path in find_indexes(folder):
        index = FeatureIndex(path)
        said = SaidModel(**index.info.model.model_dump(exclude={"layers_path", "base"}))
        if given is not None and (note := take_for_same(index.info.sae.name, said, given)):
            console.print(note, soft_wrap=True, highlight=False, markup=False)
        slug = _slug(index.info.sae.name, collection)
        wanted = _model(index, model)
        live = models.setdefault(repr(wanted), LiveModel(wanted, may_download=model is not None))
        collection[slug] = Shown(slug, index, Labels(path / LABELS_FILE, index.info.sae.d_sae), live)
    if model is not None:
        for live in models.values():
            live.load()
    return collection


def _model(index: FeatureIndex, wanted: str | None) -> Model:
    """The language model of an index, or the one to use in its place."""
    identity = index.info.model
    return Model(name=wanted) if wanted else at_revision(Model(name=identity.name), identity.revision)


def _slug(name: str, taken: dict[str, Shown]) -> str:
    slug = re.sub(r"[^a-z0-9_.]+", "-", name.lower()).strip("-.")[:80] or "sae"
    unique, number = slug, 2
    while unique in taken:
        unique, number = f"{slug}-{number}", number + 1
    return unique


def one_of(collection: dict[str, Shown], slug: str) -> Shown:
    """An index by its name in addresses.

    Raises:
        UserError: there is no index with that name.
    """
    if slug not in collection:
        raise UserError(f"there is no SAE {slug!r} here; there are: {', '.join(collection)}")
    return collection[slug]
