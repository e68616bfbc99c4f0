"""Which worker a process is, and what it may take."""

import pytest

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.format import has_segment
from olmoscope.activations.store.shares import Worker, claim_segment, parse_worker, worker_from_environment
from olmoscope.errors import UserError


def test_shares_cover_every_segment_once():
    for count in (1, 2, 5):
        owners = [[index for index in range(count) if Worker(index, count).owns(segment)] for segment in range(23)]
        assert all(len(owner) == 1 for owner in owners)


def test_reading_a_share():
    assert parse_worker("2/5") == Worker(2, 5)
    for text in ("5/5", "1", "a/b", "-1/2", "1/0", "1/2/3"):
        with pytest.raises(UserError, match="it must be I/N"):
            parse_worker(text)


def test_launchers():
    assert worker_from_environment({}) == Worker(0, 1)
    torchrun = worker_from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (torchrun.index, torchrun.count, torchrun.local_index) == (5, 8, 1)
    assert torchrun.told_by == "torchrun (RANK, WORLD_SIZE)"
    srun = worker_from_environment({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3"})
    assert (srun.index, srun.count, srun.local_index) == (3, 4, 3)
    assert worker_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == Worker(), "a batch script"


def test_a_share_and_then_the_rest(tmp_path):
    write_documents(tmp_path / "corpus", count=90)
    job = recipe(tmp_path / "corpus")
    store = tmp_path / "store"
    first = collect(job, "train", store, Worker(1, 3))
    segments = first.manifest.segments
    assert [has_segment(store, segment) for segment in range(segments)] == [s % 3 == 1 for s in range(segments)]
    assert (first.segments_made, first.segments_missing) == (2, segments - 2)
    assert not first.manifest.finished
    assert first.statistics is None
    assert collect(job, "train", store, Worker(1, 3)).segments_made == 0
    with claim_segment(store, 0):
        assert claim_segment(store, 0) is None
        others = collect(job, "train", store)
        assert (others.segments_made, others.segments_missing) == (segments - 3, 1)
    assert claim_segment(store, 1) is None, "it is made already"
    last = collect(job, "train", store, Worker(0, 3))
    assert (last.segments_made, last.segments_missing, last.manifest.finished) == (1, 0, True)
