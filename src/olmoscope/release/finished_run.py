"""What the release stage reads of a finished run: beside its SAE, the figures of done.json and evaluation.json.

Only the keys that are used are named, and each of them must be there: a figure that is absent is an error, never a
blank in a table.
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
    """done.json: what training says of itself."""

    steps: int
    tokens: int
    nmse: FiniteFloat
    l0: FiniteFloat
    dead_share: FiniteFloat | None
    """None: fewer tokens than `dead_window` were seen."""
    dead_window: int
    sinks: int = 0
    """Latents for attention sinks."""
    store: StoreOfSources
    provenance: dict[str, Any]


@dataclass(frozen=True)
class FinishedRun(RunFolder):
    """A run folder whose training is over, with its figures."""

    done: Done

    def evaluation(self) -> Evaluation:
        """The figures on held-out rows.

        Raises:
            UserError: not evaluated, damaged, or a figure absent.
        """
        return read_evaluation(self.folder / EVALUATION)


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        UserError: not a run, not finished, damaged, a figure absent, or its parts are of different runs.
    """
    run = read_run_folder(folder)
    return FinishedRun(run.folder, run.recipe, run.sae, read_done(folder, Done))
