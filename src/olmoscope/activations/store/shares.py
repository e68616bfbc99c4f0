"""Which worker makes which segments. Workers share nothing but the store's folder.

Worker I of N makes the segments s with s % N == I; a single worker makes all of them. A worker that a launcher started
then helps the others: it makes segments of their shares that no worker has begun, starting with the last one. What is
written does not depend on which worker writes it. Locks only keep two processes from doing the same work. Each is an
flock, which the kernel releases when its process ends, however it ends:

    .lock-tokens            its holder packs the tokens: the first process to arrive does this, the others wait
    .lock-worker-1-of-4     its holder works on this share
    tokens/segment-000042.safetensors    its holder makes this segment (the file is only locked), so workers with
                            different N, or one that finishes a lost worker's share, never make the same segment
    .lock-manifest          its holder begins or finishes the store
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from olmoscope.activations.store.format import has_segment
from olmoscope.distributed.place import Place, place_from_environment
from olmoscope.errors import UserError
from olmoscope.files import clean_temporary, locked, try_lock, wait_for_lock
from olmoscope.progress import console
from olmoscope.tokens.segments import segment_name

TOKENS_LOCK = ".lock-tokens"


@dataclass(frozen=True)
class Worker(Place):
    """A process that collects, one of `count`. `launcher` and `told_by` are empty if `--worker` names it."""

    @property
    def helps(self) -> bool:
        """Whether it also makes segments of other workers. One that `--worker` names makes only its own share."""
        return bool(self.launcher)

    def owns(self, segment: int) -> bool:
        """Whether a segment is in its share."""
        return segment % self.count == self.index

    def ordered(self, missing: Sequence[int]) -> list[int]:
        """The missing segments that it makes, in this order, unless others make them first."""
        own = [segment for segment in missing if self.owns(segment)]
        others = [segment for segment in reversed(missing) if not self.owns(segment)]
        return own + others if self.helps else own


def parse_worker(text: str) -> Worker:
    """Read `I/N`, counted from 0.

    Raises:
        UserError: the text does not have that form, or I is not below N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--worker {text}: it must be I/N with I from 0 to N-1, e.g. 0/4 for the first of four workers")
    return Worker(int(match[1]), int(match[2]))


def worker_from_environment(environment: Mapping[str, str]) -> Worker:
    """The worker that this process is according to torchrun, srun or Slurm's job array. It is the only worker if none
    of them started it. If each task of an array starts several processes, all processes of all tasks are workers.

    Raises:
        UserError: the tasks of the array are not evenly spaced.
    """
    place = place_from_environment(environment)
    if not all(f"SLURM_ARRAY_TASK_{name}" in environment for name in ("ID", "COUNT")):
        return Worker(**vars(place))
    task, count, first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", default)) for name, default in
                                (("ID", 0), ("COUNT", 1), ("MIN", 0), ("STEP", 1)))
    number, rest = divmod(task - first, step)
    if rest or not 0 <= number < count:
        raise UserError(f"SLURM_ARRAY_TASK_ID={task} is not one of {count} tasks from {first} in steps of {step}; "
                        f"start the array as --array=0-{count - 1}")
    told_by = " and ".join(filter(None, ["sbatch (SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT)", place.told_by]))
    return Worker(number * place.count + place.index, count * place.count, place.local_index, "sbatch", told_by)


@contextlib.contextmanager
def share_locked(store: Path, worker: Worker) -> Iterator[None]:
    """Hold a worker's share.

    Raises:
        UserError: another process holds it.
    """
    doing = "collecting" if worker.count == 1 else f"collecting share {worker.index}/{worker.count}"
    with locked(store, doing, f".lock-worker-{worker.index}-of-{worker.count}"):
        yield


@contextlib.contextmanager
def tokens_locked(store: Path) -> Iterator[None]:
    """Hold the token stage of a store; wait, and say so, while another process holds it."""
    lock = try_lock(store / TOKENS_LOCK)
    if lock is None:
        console.print(f"another process is packing the tokens of {store}; waiting for it")
        lock = wait_for_lock(store / TOKENS_LOCK)
    with lock:
        clean_temporary(store / "tokens")
        clean_temporary(store / "checksums", "tokens-*")
        yield


@contextlib.contextmanager
def manifest_locked(store: Path) -> Iterator[None]:
    """Hold the lock of what belongs to the whole store: its manifest and its statistics. Waits for other holders."""
    with wait_for_lock(store / ".lock-manifest"):
        for name in ("manifest.json", "statistics.json", "statistics.safetensors"):
            clean_temporary(store, f"{name}.*")
        yield


def claim_segment(store: Path, segment: int) -> IO[bytes] | None:
    """Claim a segment for this process, and clear away what a killed process left of it.

    Returns:
        A file that holds the claim until it is closed; None if another process is making the segment or has made it.
    """
    claim = try_lock(store / "tokens" / segment_name(segment))
    if claim is not None and has_segment(store, segment):
        claim.close()
        return None
    if claim is not None:
        for folder in store.iterdir():
            if folder.is_dir() and folder.name != "tokens":
                clean_temporary(folder, f"segment-{segment:06d}.*")
    return claim
