"""The last steps of a run, which also train on the language model's own loss (`train.finish`).

A reconstruction may be close to a row and still miss what the model reads in it. So in the last steps of training,
reconstructions replace the rows in the model, and the KL divergence KL(clean ‖ spliced) of its predictions is a second
loss beside the error (Karvonen 2025, arXiv:2503.17272).

The model needs whole sequences, but the rows of a batch come from all over the store. So each of these steps also reads
sequences, with about as many rows as its batch has. The error is computed on all rows, the model's loss only on the
rows of the sequences. With e = dNMSE/dx̂ and g = dKL/dx̂, the gradient at these rows is

    e + kl · (‖e‖ / ‖g‖) · g

so `kl` means the same whatever the units of the losses are. Ranks that train an SAE in shards share its sequences. Each
rank has its own copy of the model, which reads some of the sequences, and all ranks get all their rows and g.

Shapes: B rows of a step, R rows of its sequences, D width of the site written, T positions, C rows of a chunk, V size
of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.collect.forward import Batch, batch_of
from olmoscope.distributed.ranks import Ranks
from olmoscope.files import read_json
from olmoscope.model.sites import Place
from olmoscope.model.splice import CausalLM, Reading
from olmoscope.seeds import generator
from olmoscope.site import Site
from olmoscope.tokens.segments import TokenSegment, read_token_segment

LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
"""The largest number of logits held at a time."""
SEGMENTS_HELD = 64
"""How many token segments are kept in memory; sequences are drawn from them at random."""


@dataclass(frozen=True)
class Piece:
    """Sequences of a segment that the model reads in one pass."""

    segment: int
    first: int
    last: int
    """The first sequence that is not in it."""
    rows: int


def draw_steps(store: Path, steps: int, batch: int, seed: int, parts: int = 1) -> list[tuple[Piece, ...]]:
    """The sequences that each step reads, with about `batch` rows.

    Args:
        store: the store, with its `tokens/`.
        seed: the seed of the draw.
        parts: a piece has at most 1 / `parts` of the batch's rows, so that up to `parts` ranks can share a step.

    Raises:
        UserError: damaged tokens.
    """
    segments = range(len(read_json(store / "tokens" / "index.json")["rows"]))
    pieces = [piece for number in segments
              for piece in _pieces(read_token_segment(store, number), number, batch // parts)]
    rng = generator(seed, "sequences of the finish")
    drawn, wanted = 0, []
    order: list[int] = []
    for step in range(1, steps + 1):
        read: list[Piece] = []
        while not read or drawn < step * batch:  # so the steps together have the wanted rows, up to one piece
            order = order or rng.permutation(len(pieces)).tolist()
            read.append(pieces[order.pop()])
            drawn += read[-1].rows
        wanted.append(tuple(read))
    return wanted


def _pieces(tokens: TokenSegment, segment: int, batch: int) -> list[Piece]:
    """A segment's sequences, grouped into passes of at most `batch` tokens, or of one sequence if it is longer. The
    sequences of a planned batch have about the same length."""
    found = []
    for start, stop in pairwise(tokens.batch_starts.tolist()):
        longest = int(np.diff(tokens.sequence_starts[start : stop + 1]).max())
        size = max(1, batch // longest)
        for first in range(start, stop, size):
            last = min(stop, first + size)
            found.append(Piece(segment, first, last, int(tokens.sequence_starts[last] - tokens.sequence_starts[first])))
    return found


@dataclass(frozen=True)
class Read:
    """Sequences that the model has read."""

    rows: Mapping[Site, Tensor]
    """The rows of each site, `[R, D]`, in the model's dtype."""
    passes: list[tuple[Batch, Reading]]
    """The passes of this rank."""
    sizes: list[int]
    """How many rows the passes of each rank have; the rows are in the order of the ranks."""


class SequenceReader:
    """Runs the language model on the sequences of a step, once for all coders that are trained together.

    Args:
        model: returns the model; called when the model is first needed.
        sites: the sites whose rows are wanted.
        tokens: the store whose `tokens/` has the sequences.
        apart: whether documents are kept apart.
        ranks: the ranks that share the sequences; None if this process reads all of them.
        width: gives the width of a site's rows; needed if there are several ranks.
    """

    def __init__(self, model: Callable[[], CausalLM], sites: Sequence[Site], tokens: Path, apart: bool,
                 ranks: Ranks | None = None, width: Callable[[Site], int] | None = None) -> None:
        self._model, self.sites, self.apart = model, sites, apart
        self.ranks, self._width = ranks or Ranks.alone(), width
        self._segment = lru_cache(SEGMENTS_HELD)(lambda segment: read_token_segment(tokens, segment))
        self.read = lru_cache(1)(self._read)

    @property
    def model(self) -> CausalLM:
        """The language model, loaded when it is first needed."""
        return self._model()

    @cached_property
    def places(self) -> Mapping[Site, Place]:
        """Where the sites are in the model."""
        return self.model.find(self.sites).places

    def _read(self, step: tuple[Piece, ...]) -> Read:
        ranks = self.ranks
        shares = [step[start:stop] for start, stop in pairwise(ranks.bounds(len(step)))]
        sizes = [sum(piece.rows for piece in share) for share in shares]
        with ranks.agreed():
            places = self.places
            batches = [batch_of(self._segment(piece.segment), piece.first, piece.last, self.apart).to(self.model.device)
                       for piece in shares[ranks.index]]
            passes = [(batch, self.model.read(batch.token_ids_BT, batch.positions_BT, list(places.values())))
                      for batch in batches]
        rows = {site: [reading.at[site].flatten(0, 1)[batch.real_R] for batch, reading in passes] for site in places}
        if ranks.count == 1:
            return Read({site: torch.cat(some) for site, some in rows.items()}, passes, sizes)
        assert self._width is not None, "several ranks need the widths"
        return Read({site: ranks.gather_some(  # a rank may have none, so their dtype is settled
            torch.cat([torch.empty(0, self._width(site), device=self.model.device), *some]).float(), sizes)
            for site, some in rows.items()}, passes, sizes)


class ModelLoss:
    """The KL divergence of a model's predictions when reconstructions replace rows.

    Args:
        reader: runs the model.
        writes: the site that the coder writes.
        kl: the norm of this loss's gradient, as a multiple of that of the error's gradient.
        axes_DD: the axes along which the coder is trained (train/axes.py); None for the channels.
    """

    def __init__(self, reader: SequenceReader, writes: Site, kl: float, axes_DD: Tensor | None = None) -> None:
        self.reader, self.writes, self.kl, self.axes_DD = reader, writes, kl, axes_DD

    def pull(self, read: Read, xhat_BD: Tensor, y_BD: Tensor, e_BD: Tensor) -> Tensor:
        """The gradient to add to that of the error, `[B, D]`; see `gradients.Pull`. All ranks must call this.

        Args:
            read: the sequences, whose rows are the last rows of the batch.
            xhat_BD: the reconstructions. Only `xhat_BD - y_BD` matters: the part of a row that the trained latents do
                not reconstruct (its part along sinks) stays unchanged.
            y_BD: the target rows.
            e_BD: the gradient of the error.
        """
        ranks, others = self.reader.ranks, len(y_BD) - sum(read.sizes)
        off_RD = (xhat_BD - y_BD)[others:]
        if self.axes_DD is not None:
            off_RD = off_RD @ self.axes_DD.T
        mine_RD = torch.split(off_RD, read.sizes)[ranks.index]
        off = torch.split(mine_RD, [len(batch.real_R) for batch, _ in read.passes])
        own = [self._gradient(batch, reading, off_RD).to(e_BD.dtype)
               for (batch, reading), off_RD in zip(read.passes, off, strict=True)]
        g_RD = ranks.gather_some(torch.cat([e_BD[:0], *own]), read.sizes)
        if self.axes_DD is not None:
            g_RD = g_RD @ self.axes_DD
        scale = float(e_BD[others:].norm() / g_RD.norm().clamp_min(torch.finfo(g_RD.dtype).tiny))
        return torch.cat([torch.zeros_like(e_BD[:others]), self.kl * scale * g_RD])

    @torch.enable_grad()
    def _gradient(self, batch: Batch, reading: Reading, off_RD: Tensor) -> Tensor:
        """d(sum of KL over a pass's rows)/dx̂, `[R, D]`."""
        x_BTD = reading.at[self.writes]
        spliced_ND = x_BTD.flatten(0, 1).index_add(0, batch.real_R, off_RD.to(x_BTD.dtype)).requires_grad_()
        place = self.reader.places[self.writes]
        hidden_BTD = self.reader.model.go_on(place, spliced_ND.view_as(x_BTD), reading)
        hidden_RD = hidden_BTD.flatten(0, 1)[batch.real_R]
        clean_RD = reading.hidden_BTD.flatten(0, 1)[batch.real_R]
        (gradient_ND,) = torch.autograd.grad(hidden_RD, spliced_ND, self._at_the_head(clean_RD, hidden_RD.detach()))
        return gradient_ND[batch.real_R]

    def _at_the_head(self, clean_RD: Tensor, hidden_RD: Tensor) -> Tensor:
        """dKL/d(last hidden state), `[R, D]`, computed for some rows at a time. dKL/dlogits is q − p."""
        model = self.reader.model
        size = max(1, LOGITS_AT_ONCE.get(model.device.type, 2**24) // model.vocabulary)
        found: list[Tensor] = []
        for start in range(0, len(clean_RD), size):
            with torch.no_grad():
                p_CV = model.logits(clean_RD[start : start + size]).float().softmax(1)
            state_CD = hidden_RD[start : start + size].clone().requires_grad_()
            logits_CV = model.logits(state_CD)
            asked_CV = (logits_CV.detach().float().softmax(1) - p_CV).to(logits_CV.dtype)
            found += torch.autograd.grad(logits_CV, state_CD, asked_CV)
        return torch.cat(found)
