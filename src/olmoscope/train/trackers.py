"""`olmoscope train --log wandb|tensorboard`: each line of metrics.jsonl is also sent to a tracker, once.

A run that is resumed after a kill continues the tracker's run: `tracker-NAME.json` in the run folder says what the
tracker already has. Lines on disk that were not sent (because the run was trained without `--log` so far) are sent
first.
"""

import contextlib
import importlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from olmoscope.errors import UserError
from olmoscope.files import read_json, write_json
from olmoscope.recipe.schema import CoderConfig, Recipe

TrackerName = Literal["wandb", "tensorboard"]
Line = dict[str, Any]
PROJECT = "olmoscope"
"""The wandb project, unless the environment variable WANDB_PROJECT names another."""


class Tracker:
    """The tracker of one SAE's run.

    Args:
        send: sends a line to the tracker.
        sent: the last step that the tracker has.
    """

    def __init__(self, send: Callable[[Line], None], sent: int) -> None:
        self._send, self.sent = send, sent

    def catch_up(self, metrics: Path) -> None:
        """Send the lines of a metrics.jsonl that the tracker lacks."""
        if metrics.exists():
            for text in metrics.read_text(encoding="utf-8").splitlines():
                self.send(json.loads(text))

    def send(self, line: Line) -> None:
        """Send a line, unless its step was sent before: a run that was killed writes some lines again."""
        if line["step"] > self.sent:
            self.sent = line["step"]
            self._send({key: value for key, value in line.items() if value is not None})


def open_tracker(name: TrackerName | None, recipe: Recipe, sae: CoderConfig,
                 run: Path) -> contextlib.AbstractContextManager[Tracker | None]:
    """A context manager that gives the tracker of an SAE's run, or None if `name` is None. Leave it when the run ends.

    Raises:
        UserError: on entering, if the tracker's package is not installed, or if wandb does not start (for example
            because nobody is logged in).
    """
    if name is None:
        return contextlib.nullcontext()
    return _wandb(recipe, sae, run) if name == "wandb" else _tensorboard(run)


@contextlib.contextmanager
def _wandb(recipe: Recipe, sae: CoderConfig, run: Path) -> Iterator[Tracker]:
    """wandb's own settings apply: WANDB_MODE=offline needs no account and keeps everything in the run folder until
    `wandb sync`.

    A killed offline session may have written any part of its lines, so it is deleted and its lines are sent again.
    Online, wandb itself ignores steps that it has.
    """
    wandb = _package("wandb", "wandb")
    record = run / "tracker-wandb.json"
    before: Line = read_json(record) if record.exists() else {"id": uuid.uuid4().hex[:12], "step": 0}
    if unfinished := before.get("unfinished"):
        shutil.rmtree(run / "wandb" / unfinished, ignore_errors=True)
    settings = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
    try:
        session = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=sae.id, id=before["id"],
                             resume="allow", dir=run, config=recipe.model_dump(mode="json"), reinit="create_new",
                             settings=settings)
    except wandb.Error as error:
        raise UserError(f"wandb does not start: {' '.join(str(error).split())} (WANDB_MODE=offline needs no account)"
                        ) from error
    write_json(record, before | {"unfinished": Path(session.dir).parent.name if session.offline else None})
    tracker = Tracker(lambda line: session.log(line, step=line["step"]), before["step"])
    try:
        yield tracker
    finally:
        session.finish()
        write_json(record, {"id": before["id"], "step": tracker.sent})


@contextlib.contextmanager
def _tensorboard(run: Path) -> Iterator[Tracker]:
    """Event files in the folder `tensorboard` of the run: `tensorboard --logdir OUT/runs` shows all SAEs."""
    writer = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(run / "tensorboard"))
    record = run / "tracker-tensorboard.json"

    def send(line: Line) -> None:
        # Written before the line: a kill in between loses the line, but does not send it twice.
        write_json(record, {"step": line["step"]})
        for key, value in line.items():
            if key != "step":
                writer.add_scalar(key, value, line["step"])
        writer.flush()

    try:
        yield Tracker(send, read_json(record)["step"] if record.exists() else 0)
    finally:
        writer.close()


def _package(name: TrackerName, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--log {name} needs the package {name}: pip install 'olmoscope[{name}]'") from error
