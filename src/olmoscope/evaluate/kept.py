"""Sums of an unfinished evaluation, kept on disk: an evaluation resumed from them gives the same
figures, bit for bit.

The steps of a pass are cut into pieces of neighbours. Each piece is summed from zero into a file of its own, and the
pieces are added up in their order. So neither a restart nor the number of processes that share the pieces changes a
bit.
"""

import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olmoscope.distributed.ranks import Ranks
from olmoscope.errors import UserError
from olmoscope.files import atomic_path
from olmoscope.progress import bar

SAVE_SECONDS = 60.0
"""A killed process loses at most this much work."""
PIECES = 16
"""The most pieces of a pass: at most this many processes share it."""

_Step = TypeVar("_Step")


class KeptSums:
    """Tensors that accumulate sums in place, and the files in which they are kept."""

    def __init__(self, folder: Path, name: str, identity: str, tensors: dict[str, Tensor], ranks: Ranks) -> None:
        """
        Args:
            folder: of the files; several ranks must all see it.
            name: of the pass.
            identity: identifies the evaluation. A file of another evaluation, or with other tensors, is ignored.
            ranks: those that share the steps; each must have the same tensors.
        """
        self.folder, self.name, self.ranks = folder, name, ranks
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        self._identity = f"{identity} {json.dumps(shapes)}"
        self._tensors = tensors

    def path(self, piece: int) -> Path:
        """The file of a piece."""
        return self.folder / f".unfinished-{self.name}-{piece:02d}.safetensors"

    def load(self, piece: int, bounds: Sequence[int]) -> int:
        """Fill the tensors from the file of a piece; returns how many of its steps they hold. Without such a file they
        become zeros, and hold none.

        Args:
            bounds: where each piece begins, and the end.
        """
        try:
            with safe_open(self.path(piece), "pt") as file:
                kept = json.loads((file.metadata() or {}).get("olmoscope", "{}"))
                if kept.get("identity") == self._identity and kept.get("bounds") == list(bounds):
                    for name, tensor in self._tensors.items():
                        tensor.copy_(file.get_tensor(name))
                    return int(kept["steps"])
        except (FileNotFoundError, SafetensorError):
            pass
        for tensor in self._tensors.values():
            tensor.zero_()
        return 0

    def save(self, piece: int, bounds: Sequence[int], steps: int) -> None:
        """Write the tensors, which hold this many steps of a piece."""
        with atomic_path(self.path(piece)) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self._tensors.items()}, temporary,
                      {"olmoscope": json.dumps({"identity": self._identity, "bounds": list(bounds), "steps": steps})})

    def go_through(self, steps: Sequence[_Step], rows: Callable[[_Step], int], do: Callable[[_Step], None],
                   doing: str) -> None:
        """Do all steps that were not done before, saving now and then and after each piece; then the tensors hold the
        sums of all steps of all ranks.

        Args:
            rows: how many rows a step has, for the progress bar.
            doing: what the bar says.

        Raises:
            UserError: what `do` raises, on any rank; or the ranks do not see the same folder.
        """
        pieces = max(1, min(len(steps), PIECES))
        bounds = [len(steps) * piece // pieces for piece in range(pieces + 1)]
        parts = [steps[start:stop] for start, stop in pairwise(bounds)]
        own = range(self.ranks.index, pieces, self.ranks.count)
        with self.ranks.agreed():
            done = {piece: self.load(piece, bounds) for piece in own}
            before = sum(rows(step) for piece in own for step in parts[piece][: done[piece]])
            with bar(doing, sum(rows(step) for piece in own for step in parts[piece]), "tokens", before) as advance:
                for piece in own:
                    if done[piece] < len(parts[piece]):
                        self._finish(piece, bounds, parts[piece], do, lambda step: advance(rows(step)))
        with self.ranks.agreed():
            self._add_up(bounds)

    def _finish(self, piece: int, bounds: Sequence[int], steps: Sequence[_Step], do: Callable[[_Step], None],
                advance: Callable[[_Step], None]) -> None:
        """Do the steps of a piece that its file does not hold."""
        done, saved = self.load(piece, bounds), time.monotonic()
        for number, step in enumerate(steps[done:], start=done + 1):
            do(step)
            advance(step)
            if number == len(steps) or time.monotonic() - saved > SAVE_SECONDS:
                self.save(piece, bounds, number)
                saved = time.monotonic()

    def _add_up(self, bounds: Sequence[int]) -> None:
        """Fill the tensors with the sum of all pieces."""
        totals = {name: torch.zeros_like(tensor) for name, tensor in self._tensors.items()}
        for piece, (start, stop) in enumerate(pairwise(bounds)):
            if self.load(piece, bounds) != stop - start:
                raise UserError(f"{self.path(piece)} is missing, or belongs to another evaluation: another process "
                                "wrote it to another folder, or deleted it. All processes must see the same folder; "
                                "run the command again")
            for name, total in totals.items():
                total += self._tensors[name]
        for name, total in totals.items():
            self._tensors[name].copy_(total)
