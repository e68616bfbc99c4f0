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


@pytest.mark.parametrize(("task", "more", "worker"), [
    ({"ID": "2", "COUNT": "4"}, {}, (2, 4, 0)), ({"ID": "5", "COUNT": "3", "MIN": "1", "STEP": "2"}, {}, (2, 3, 0)),
    ({"ID": "1", "COUNT": "2"}, {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3"}, (7, 8, 3))])
def test_a_job_array(task, more, worker):
    found = worker_from_environment({f"SLURM_ARRAY_TASK_{name}": value for name, value in task.items()} | more)
    assert (found.index, found.count, found.local_index) == worker
    assert found.told_by.startswith("sbatch (SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT)") and found.helps


def test_an_array_of_odd_tasks_is_refused():
    with pytest.raises(UserError, match=r"ID=7 is not one of 3 tasks from 1 in steps of 1; start .* --array=0-2$"):
        worker_from_environment({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3",
                                 "SLURM_ARRAY_TASK_MIN": "1"})


def test_a_launched_worker_takes_over_what_nobody_has_begun(tmp_path):
    write_documents(tmp_path / "corpus", count=90)
    store = tmp_path / "store"
    job = recipe(tmp_path / "corpus", activations={"layers": [1]}, saes=[{"layer": 1, "d_sae": 512, "k": 8}])
    one = collect(job, "train", tmp_path / "one")
    assert Worker(1, 3, launcher="srun").ordered(range(6)) == [1, 4, 5, 3, 2, 0]
    assert Worker(1, 3).ordered(range(6)) == [1, 4]
    collect(job, "train", store, Worker(2, 3))
    with claim_segment(store, 0):
        found = collect(job, "train", store, Worker(1, 3, launcher="srun"))
        assert found.segments_missing == 1 and not has_segment(store, 0)
    assert collect(job, "train", store, Worker(0, 3, launcher="srun")).segments_made == 1
    files = {path.relative_to(one.store): path.read_bytes() for path in one.store.rglob("*.safetensors")}
    assert files == {path.relative_to(store): path.read_bytes() for path in store.rglob("*.safetensors")}


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
