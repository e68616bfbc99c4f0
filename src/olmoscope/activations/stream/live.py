"""The live stream: rounds straight from the model, through a bounded buffer, without a store of activations.

Only tokens/ is on disk, packed as for a store. In each epoch, each segment of tokens goes through the model once, for
all sites together. Its rows are permuted and split into P parts. Part p of segment s is dealt out in slot s + p, mixed
with the other parts of that slot:

    slot      0    1    2    3    4 ...         P = 3; slots before P / 2 are one round, and so are
    segment 0 a    b    c                       the last ones: they would be short and poorly mixed
    segment 1      a    b    c
    segment 2           a    b    c

So a round as large as one segment mixes the contexts of P segments, while memory holds the rows of only about P / 2
segments (the "convolutional interleaver" of Ramsey 1970 and Forney 1971). In the same memory, a buffer that is filled
and then emptied mixes half as many contexts, and less evenly. A round depends only on the seed, the epoch and its
number, so the three integers of a stream are its whole state. Resuming costs a forward pass over at most P segments,
which fills the buffer again.

If there are several ranks, each has the model. Rank I of N runs the segments I, I + N, I + 2N and so on. It runs each
of them when the first segment of the same group of N is needed, so that all ranks run one at the same time. The rounds
are the same for any number of ranks.
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
from olmoscope.activations.store.format import Manifest, read_dtype, stored_order
from olmoscope.activations.store.gather import SiteRows
from olmoscope.activations.store.shares import tokens_locked
from olmoscope.activations.stream.filters import Kept, RowFacts, keep
from olmoscope.activations.stream.rounds import Round
from olmoscope.distributed.ranks import Ranks
from olmoscope.model.load import LoadedModel, load_model, pick_device
from olmoscope.recipe.schema import Live, Recipe, Split
from olmoscope.sae.normalize import Normalize, normalize_rows
from olmoscope.seeds import generator
from olmoscope.site import Site
from olmoscope.tokens.pack import pack
from olmoscope.tokens.segments import TokenSegment, read_token_segment

Part = tuple[int, int]
"""The number of a segment, and of one of its parts."""


def open_live(recipe: Recipe, sites: list[Site], split: Split, store: Path, device: torch.device | None = None,
              ranks: Ranks | None = None) -> "LiveRounds":
    """Load the model up to the deepest site of the recipe, and pack the tokens of a split (if they are not packed yet).

    Args:
        sites: the sites wanted, in ascending order; a subset of the recipe's.
        store: the folder of the split's store. It gets tokens/ and an unfinished manifest, from which `olmoscope
            collect` can continue.
        device: the model's device; by default the recipe's.
        ranks: the ranks that share the segments; each must call this.

    Raises:
        UserError: the folder holds another recipe's store or is being filled; the text or the model cannot be loaded;
            or the filter leaves no row.
    """
    refuse_another_store(store, recipe)
    wanted = model_of_store(recipe, store)
    tokenizer = ready_to_pack(recipe, wanted, split)
    # The manifest lists all sites of the recipe, whichever SAEs train first.
    model = load_model(wanted, recipe.activations.sites, device or pick_device(recipe.device))
    model.probe.refuse_leak(wanted.name, recipe.tokens.documents)
    with tokens_locked(store):
        forget_tail(recipe, split, store)
        index = pack(recipe, tokenizer, split, store, wanted)
    manifest = make_manifest(recipe, split, model, tokenizer, index)
    begin_store(store, recipe, manifest)
    return LiveRounds(recipe, sites, model, manifest, index["rows"], store, ranks or Ranks.alone())


class LiveRounds:
    """Rounds of some sites, made by the model on demand. Memory: `train.live.rows` rows, and the rows of up to three
    segments. With several ranks, each holds its share of the first, and the rows of one more segment."""

    ahead = False
    """The model and the SAEs share a device, so reading ahead in a thread would only make them wait for each other."""

    def __init__(self, recipe: Recipe, sites: list[Site], model: LoadedModel, manifest: Manifest,
                 segment_rows: list[int], store: Path, ranks: Ranks) -> None:
        self.ranks, self.share = ranks, (ranks.index, ranks.count)
        self.recipe = recipe.model_copy(update={"activations": recipe.activations.model_copy(
            update={"sites": sites})})
        self.sites, self.model, self.manifest, self.segment_rows, self.store = (
            sites, model, manifest, segment_rows, store)
        live = recipe.train.live or Live()
        self.device = model.device if live.buffer == "device" else torch.device("cpu")
        self.parts = parts(live.rows, segment_rows)
        self.rounds = rounds_of_parts(len(segment_rows), self.parts)
        self._round_of = {part: number for number, wanted in enumerate(self.rounds) for part in wanted}
        self.kept = self._keep()
        self.sizes = [sum(int(self._mask(part).sum()) for part in wanted) for wanted in self.rounds]
        self._held: dict[Part, dict[Site, Tensor]] = {}
        self._begun: set[int] = set()
        """The segments of this epoch that were run, or whose parts have all been dealt out."""
        self._next = (0, 0)
        self._sampled: tuple[Round, Round] | None = None
        """All rows of the first round, and this rank's rows of it; kept from their first use until they are dealt out.
        """

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
            (_, sampled), self._sampled = self._sampled, None
            return sampled
        if (epoch, number) != self._next or number == 0:
            self._held.clear()
            self._begun.clear()
        rank, ranks = self.share
        for segment, _ in self.rounds[number]:
            own = segment - segment % ranks + rank
            if own < len(self.segment_rows) and own not in self._begun:
                self._begun.add(own)
                left = [part for part in range(self.parts) if self._round_of[own, part] >= number]
                if left:
                    self._held |= self._run(own, left[0])
        taken = [self._held.pop(part) for part in self.rounds[number] if part[0] % ranks == rank]
        self._next = (epoch, number + 1) if number + 1 < len(self.rounds) else (epoch + 1, 0)
        order = self._order_of_round(epoch, number)
        is_own_R = self._owners(number) == rank
        chosen = torch.from_numpy((np.cumsum(is_own_R) - 1)[order[is_own_R[order]]]).to(self.device)
        dtype = read_dtype(self.recipe.activations.dtype)
        return {site: torch.cat([torch.empty(0, self.model.sites.widths[site], dtype=dtype, device=self.device),
                                 *(rows[site] for rows in taken)])[chosen] for site in self.sites}

    def owners(self, epoch: int, number: int) -> np.ndarray:
        """See `Rounds`."""
        return np.asarray(self._owners(number)[self._order_of_round(epoch, number)])

    def _owners(self, number: int) -> np.ndarray:
        """The rank that has each row of a round, before the rows are mixed: part after part, `[R]`."""
        parts = self.rounds[number]
        return np.repeat([segment % self.ranks.count for segment, _ in parts],
                         [self._slice(part).stop - self._slice(part).start for part in parts])

    def _order_of_round(self, epoch: int, number: int) -> np.ndarray:
        """Which of the rows of a round's parts is dealt out first, second and so on."""
        kept = np.flatnonzero(np.concatenate([self._mask(part) for part in self.rounds[number]]))
        return generator(self.recipe.seed, "rows of a live round", epoch, number).permutation(kept)

    def _first_round(self) -> Round:
        """The whole first round, on every rank.

        Raises:
            UserError: as `read`. If one rank cannot read its rows, all ranks raise.
        """
        if self._sampled is None:
            with self.ranks.agreed():
                own = self.read(0, 0, None)
            owners = None if self.ranks.count == 1 else self.owners(0, 0)
            self._sampled = {site: self.ranks.begin_gather_dealt(rows, owners)() for site, rows in own.items()}, own
        return self._sampled[0]

    def sample_mean(self, site: Site, normalize: Normalize) -> Tensor:
        """The mean over the first round, which is a random sample of the first segments; see `Rounds`."""
        x_BD = normalize_rows(self._first_round()[site].float(), normalize)[0]
        return x_BD.mean(dim=0, dtype=torch.float64).float().cpu()

    def median_norm(self, site: Site) -> float:
        """The median norm over the first round; see `Rounds`."""
        return float(self._first_round()[site].float().norm(dim=1).median())

    def sample(self, site: Site, rows: int) -> Tensor:
        """Rows of the first round; see `Rounds`."""
        return self._first_round()[site][:rows].float().cpu()

    def outliers(self, site: Site, over: float, rows: int) -> Tensor:
        """Outliers among the rows of the first round; see `Rounds`."""
        x_ND = self._first_round()[site].float()
        return x_ND[x_ND.norm(dim=1) > over][:rows].cpu()

    def _run(self, segment: int, first: int) -> dict[Part, dict[Site, Tensor]]:
        """Run the model on a segment; return its parts from `first` on."""
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
        """The permutation of a segment's rows before it is split into parts, the same as in a store, `[rows]`."""
        return stored_order(self.recipe.seed, segment, self.segment_rows[segment])

    def _slice(self, part: Part) -> slice:
        rows = self.segment_rows[part[0]]
        return slice(rows * part[1] // self.parts, rows * (part[1] + 1) // self.parts)

    def _mask(self, part: Part) -> np.ndarray:
        """Which rows of a part are kept, `[rows]` bool."""
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
    """The number of parts P into which to split a segment, so that the buffer holds about `buffer_rows` rows. P is at
    most the number of segments.

    After a slot, the buffer holds P − 1 parts of one of its P segments, P − 2 parts of the next, and so on. Together
    these are the rows of (P − 1) / 2 segments.
    """
    return max(1, min(len(segment_rows), 1 + round(2 * buffer_rows / max(segment_rows))))


def rounds_of_parts(segments: int, count: int) -> list[list[Part]]:
    """The parts of each round of an epoch. Each part occurs once; the first parts of segments come in ascending order
    of segments."""
    slots = [[(segment, slot - segment) for segment in range(max(0, slot - count + 1), min(slot, segments - 1) + 1)]
             for slot in range(segments + count - 1)]
    edge = count // 2
    middle = slots[edge : len(slots) - edge] if edge else slots
    ends = [sorted(part for slot in some for part in slot) for some in (slots[:edge], slots[len(slots) - edge :])]
    return [part for part in (ends[0], *middle, ends[1]) if part]
