"""The live stream: rounds straight from the model, through a bounded buffer, without a store of activations.

Only tokens/ is on disk, packed as for a store. A segment of tokens goes through the model once an epoch, for all
sites at once; its rows are permuted and cut into P parts. Part p of segment s is dealt out in slot s + p, mixed with
the other parts of that slot:

    slot      0    1    2    3    4 ...         P = 3; slots before P / 2 are one round, and so are
    segment 0 a    b    c                       the last ones: they would be short and poorly mixed
    segment 1      a    b    c
    segment 2           a    b    c

So a round of one segment's size mixes the contexts of P segments, while only about P / 2 segments' rows are held (the
"convolutional interleaver" of Ramsey 1970 and Forney 1971): twice the contexts of a buffer that is filled and emptied,
for the same memory, and evenly. Rounds depend on nothing but seed, epoch and number, so the three integers of a stream
are all its state; going on after a restart costs a forward pass over at most P segments, to fill the buffer anew.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.collect.begun import model_of_store
from olmoscope.activations.collect.forget import forget_tail
from olmoscope.activations.collect.forward import batches, site_rows
from olmoscope.activations.collect.refusals import refuse_another_store, refuse_not_finite, refuse_overflow
from olmoscope.activations.collect.run import begin_store, make_manifest, ready_to_pack
from olmoscope.activations.store.format import Manifest, stored_order
from olmoscope.activations.store.gather import SiteRows
from olmoscope.activations.store.shares import tokens_locked
from olmoscope.activations.stream.filters import Kept, RowFacts, keep
from olmoscope.activations.stream.rounds import Round
from olmoscope.model.load import LoadedModel, load_model, pick_device
from olmoscope.recipe.schema import Live, Recipe, Split
from olmoscope.sae.normalize import Normalize, normalize_rows
from olmoscope.seeds import generator
from olmoscope.site import Site
from olmoscope.tokens.pack import pack
from olmoscope.tokens.segments import TokenSegment, read_token_segment

Part = tuple[int, int]
"""A segment, and which of its parts."""


def open_live(recipe: Recipe, sites: list[Site], split: Split, store: Path) -> "LiveRounds":
    """Load the model up to the deepest site of the recipe, and pack the tokens of a split (if they are not packed yet).

    Args:
        sites: those wanted, of the recipe's; ascending.
        store: the folder of the split's store; it gets tokens/ and an unfinished manifest, which `olmoscope collect`
            can go on from.

    Raises:
        UserError: the folder holds another recipe's store or is being filled; no text or no model; nothing is left
            after the filter.
    """
    refuse_another_store(store, recipe)
    wanted = model_of_store(recipe, store)
    tokenizer = ready_to_pack(recipe, wanted, split)
    # All sites of the recipe: the manifest is of them, whichever SAEs train first.
    model = load_model(wanted, recipe.activations.sites, pick_device(recipe.device))
    model.probe.refuse_leak(wanted.name, recipe.tokens.documents)
    with tokens_locked(store):
        forget_tail(recipe, split, store)
        index = pack(recipe, tokenizer, split, store, wanted)
    manifest = make_manifest(recipe, split, model, tokenizer, index)
    begin_store(store, recipe, manifest)
    return LiveRounds(recipe, sites, model, manifest, index["rows"], store)


class LiveRounds:
    """Rounds of some sites, made by the model on demand. Memory: `train.live.rows` and up to three segments' rows."""

    share = 0, 1
    ahead = False
    """The model and the SAEs share a device: a thread would only make them wait for each other."""

    def __init__(self, recipe: Recipe, sites: list[Site], model: LoadedModel, manifest: Manifest,
                 segment_rows: list[int], store: Path) -> None:
        self.recipe = recipe.model_copy(update={"activations": recipe.activations.model_copy(
            update={"sites": sites})})
        self.sites, self.model, self.manifest, self.segment_rows, self.store = (
            sites, model, manifest, segment_rows, store)
        live = recipe.train.live or Live()
        self.device = model.device if live.buffer == "device" else torch.device("cpu")
        self.parts = parts(live.rows, segment_rows)
        self.rounds = rounds_of_parts(len(segment_rows), self.parts)
        self.kept = self._keep()
        self.sizes = [sum(int(self._mask(part).sum()) for part in wanted) for wanted in self.rounds]
        self._held: dict[Part, dict[Site, Tensor]] = {}
        self._next = (0, 0)
        self._sampled: Round | None = None
        """The first round, from its use for the mean until it is dealt out."""

    @property
    def tokens(self) -> Path:
        """See `Rounds`."""
        return self.store

    def read(self, epoch: int, number: int, spare: Round | None) -> Round:
        """Run the segments that are not held yet, and mix a round; see `Rounds`.

        Raises:
            UserError: damaged tokens, or an activation is not finite.
        """
        if self._sampled and (epoch, number) == (0, 0):
            sampled, self._sampled = self._sampled, None
            return sampled
        if (epoch, number) != self._next:
            self._held.clear()
        wanted = self.rounds[number]
        for segment, first in wanted:
            if (segment, first) not in self._held:
                self._held |= self._run(segment, first)
        taken = [self._held.pop(part) for part in wanted]
        self._next = (epoch, number + 1) if number + 1 < len(self.rounds) else (epoch + 1, 0)
        kept = np.flatnonzero(np.concatenate([self._mask(part) for part in wanted]))
        order = generator(self.recipe.seed, "rows of a live round", epoch, number).permutation(kept)
        chosen = torch.from_numpy(order).to(self.device)
        return {site: torch.cat([rows[site] for rows in taken])[chosen] for site in self.sites}

    def owners(self, epoch: int, number: int) -> np.ndarray:
        """See `Rounds`."""
        return np.zeros(self.sizes[number], np.int64)

    def sample_mean(self, site: Site, normalize: Normalize) -> Tensor:
        """The mean over the first round, which is a random sample of the first segments; see `Rounds`."""
        self._sampled = self._sampled or self.read(0, 0, None)
        x_BD = normalize_rows(self._sampled[site].float(), normalize)[0]
        return x_BD.mean(dim=0, dtype=torch.float64).float().cpu()

    def median_norm(self, site: Site) -> float:
        """Over the first round; see `Rounds`."""
        self._sampled = self._sampled or self.read(0, 0, None)
        return float(self._sampled[site].float().norm(dim=1).median())

    def sample(self, site: Site, rows: int) -> Tensor:
        """Rows of the first round; see `Rounds`."""
        self._sampled = self._sampled or self.read(0, 0, None)
        return self._sampled[site][:rows].float().cpu()

    def outliers(self, site: Site, over: float, rows: int) -> Tensor:
        """Outliers among the rows of the first round; see `Rounds`."""
        self._sampled = self._sampled or self.read(0, 0, None)
        x_ND = self._sampled[site].float()
        return x_ND[x_ND.norm(dim=1) > over][:rows].cpu()

    def _run(self, segment: int, first: int) -> dict[Part, dict[Site, Tensor]]:
        """A segment through the model; its parts from `first` on."""
        tokens = read_token_segment(self.store, segment)
        order_R = self._order(segment)
        places_R = torch.from_numpy(np.argsort(order_R)).to(self.device)
        rows = {site: SiteRows(tokens.rows, self.model.sites.widths[site], self.recipe.activations.dtype, self.device)
                for site in self.sites}
        for made in rows.values():
            made.start()
        for batch in batches(tokens, apart=self.recipe.tokens.documents == "apart"):
            for site, output_BD in site_rows(self.model, self.sites, batch.to(self.model.device)):
                rows[site].add(places_R[batch.rows], output_BD.to(self.device))
        for site, made in rows.items():
            refuse_not_finite(site, made, tokens, order_R)
            refuse_overflow(site, made)
        return {(segment, part): {site: made.read(self._slice((segment, part))) for site, made in rows.items()}
                for part in range(first, self.parts)}

    def _order(self, segment: int) -> np.ndarray:
        """How the rows of a segment are permuted before it is cut into parts; as in a store."""
        return stored_order(self.recipe.seed, segment, self.segment_rows[segment])

    def _slice(self, part: Part) -> slice:
        rows = self.segment_rows[part[0]]
        return slice(rows * part[1] // self.parts, rows * (part[1] + 1) // self.parts)

    def _mask(self, part: Part) -> np.ndarray:
        """Which rows of a part stay."""
        if self.kept.masks is None:
            return np.ones(self._slice(part).stop - self._slice(part).start, bool)
        return self.kept.masks[part[0]][self._slice(part)]

    def _keep(self) -> Kept:
        facts = (self._facts(segment, read_token_segment(self.store, segment))
                 for segment in range(len(self.segment_rows)))
        return keep(self.recipe.train.filter, facts, self.manifest.special_token_ids, {}, sum(self.segment_rows))

    def _facts(self, segment: int, tokens: TokenSegment) -> RowFacts:
        positions = np.concatenate([np.arange(length) for length in np.diff(tokens.sequence_starts)])
        order = self._order(segment)
        return RowFacts(tokens.token_ids[order], positions[order], {})


def parts(buffer_rows: int, segment_rows: list[int]) -> int:
    """Into how many parts a segment is cut so that the buffer holds ~`buffer_rows` rows; at most one for each segment.

    Of the P segments of a slot, one has P − 1 parts left after it, the next P − 2, and so on: (P − 1) / 2 segments.
    """
    return max(1, min(len(segment_rows), 1 + round(2 * buffer_rows / max(segment_rows))))


def rounds_of_parts(segments: int, count: int) -> list[list[Part]]:
    """The parts of each round of an epoch; each part once, first parts in ascending order of segments."""
    slots = [[(segment, slot - segment) for segment in range(max(0, slot - count + 1), min(slot, segments - 1) + 1)]
             for slot in range(segments + count - 1)]
    edge = count // 2
    middle = slots[edge : len(slots) - edge] if edge else slots
    ends = [sorted(part for slot in some for part in slot) for some in (slots[:edge], slots[len(slots) - edge :])]
    return [part for part in (ends[0], *middle, ends[1]) if part]
