"""Sums of an unfinished evaluation, kept on disk: an evaluation resumed from them gives the same figures, bit for
bit."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olmoscope.files import atomic_path
from olmoscope.progress import bar

SAVE_SECONDS = 60.0
"""A killed process loses at most this much work."""

_Step = TypeVar("_Step")


class KeptSums:
    """Tensors that accumulate sums in place, and the file in which they are kept."""

    def __init__(self, path: Path, identity: str, tensors: dict[str, Tensor]) -> None:
        """
        Args:
            identity: identifies the evaluation. A file of another evaluation, or with other tensors, is ignored.
        """
        self.path = path
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        self._identity = f"{identity} {json.dumps(shapes)}"
        self._tensors = tensors

    def load(self) -> int:
        """Fill the tensors from the file; returns how many steps they hold, 0 if there is nothing to resume."""
        try:
            with safe_open(self.path, "pt") as file:
                kept = json.loads((file.metadata() or {}).get("olmoscope", "{}"))
                if kept.get("identity") != self._identity:
                    return 0
                for name, tensor in self._tensors.items():
                    tensor.copy_(file.get_tensor(name))
        except (FileNotFoundError, SafetensorError):
            return 0
        return int(kept["steps"])

    def save(self, steps: int) -> None:
        """Write the tensors, which hold this number of steps."""
        with atomic_path(self.path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self._tensors.items()}, temporary,
                      {"olmoscope": json.dumps({"identity": self._identity, "steps": steps})})

    def go_through(self, steps: Sequence[_Step], rows: Callable[[_Step], int], do: Callable[[_Step], None],
                   doing: str) -> None:
        """Do all steps that are not done yet, in order; save from time to time and at the end.

        Args:
            rows: gives the number of rows of a step, for the progress bar.
            doing: the bar's text.
        """
        done, saved = self.load(), time.monotonic()
        with bar(doing, sum(map(rows, steps)), "tokens", done=sum(map(rows, steps[:done]))) as advance:
            for number, step in enumerate(steps[done:], start=done + 1):
                do(step)
                advance(rows(step))
                if time.monotonic() - saved > SAVE_SECONDS and number < len(steps):
                    self.save(number)
                    saved = time.monotonic()
        if done < len(steps):
            self.save(len(steps))
