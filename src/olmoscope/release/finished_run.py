"""What the release stage reads from a finished run: the SAE, and the figures in done.json and evaluation.json.

The models name only the keys that are used, and each key must be present: an absent figure is an error, never a blank
in a table.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat

from olmoscope.evaluate.results import EVALUATION, Evaluation, read_evaluation
from olmoscope.sae.io.run_folder import DoneRead, RunFolder, StoreRead, read_done, read_run_folder


class SourceRead(BaseModel):
    """What one text source contributed to training."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    documents: int
    tokens: int


class StoreOfSources(StoreRead):
    """Where the activations came from, text by text."""

    sources: dict[str, SourceRead]


class Done(DoneRead):
    """done.json: the figures that training reports."""

    steps: int
    tokens: int
    nmse: FiniteFloat
    l0: FiniteFloat
    dead_share: FiniteFloat | None
    """None if training saw fewer tokens than `dead_window`."""
    dead_window: int
    sinks: int = 0
    """Number of latents for attention sinks."""
    store: StoreOfSources
    provenance: dict[str, Any]


@dataclass(frozen=True)
class FinishedRun(RunFolder):
    """The folder of a finished run, with its figures."""

    done: Done

    def evaluation(self) -> Evaluation:
        """The figures on held-out rows.

        Raises:
            UserError: not evaluated, damaged, or a figure is absent.
        """
        return read_evaluation(self.folder / EVALUATION)


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        UserError: not a run, not finished, damaged, a figure is absent, or its parts are of different runs.
    """
    run = read_run_folder(folder)
    return FinishedRun(run.folder, run.recipe, run.sae, read_done(folder, Done))
