"""Several ranks write the same evaluation and index as one process, even after a rank is killed."""

import os
import shutil
import signal
from unittest import mock

import pytest

from helpers import recipe, write_documents
from olmoscope.distributed.launch import World
from olmoscope.distributed.place import Place
from olmoscope.errors import AnotherRankFailedError, UserError
from olmoscope.evaluate import evaluate, kept
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.results import EVALUATION
from olmoscope.features import parts
from olmoscope.features.rows_of import index_sae
from olmoscope.pipeline import collect_stores, evaluate_saes, train_saes
from olmoscope.train.run import run_folder
from rank_pool import RankPool


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = RankPool(tmp_path_factory.mktemp("ranks"), 3)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A recipe and the folder of its trained SAE."""
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=120)
    job = recipe(folder / "corpus", saes=[{"layer": 1, "d_sae": 200, "k": 8}], tokens__count=6000,
                 activations={"layers": [1]})
    collect_stores(job, folder / "out")
    list(train_saes(job, folder / "out", []))
    return job, folder / "out"


def world(ranks):
    return World(ranks, Place(ranks.index, ranks.count, ranks.index, "torchrun" if ranks.count > 1 else ""))


def evaluated(ranks, job, out, failing=None, killed=None):
    """Evaluate on this rank; returns its output. One rank cannot read its rows, or is killed at its third step."""
    add, steps = evaluate.Measured.reconstruct, []

    def reconstruct(self, *arguments, **named):
        steps.append(None)
        if ranks.index == killed and len(steps) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.index == failing:
            raise UserError("a segment is damaged")
        return add(self, *arguments, **named)

    with mock.patch.object(evaluate.Measured, "reconstruct", reconstruct), \
            mock.patch.object(evaluate, "ROWS_AT_ONCE", 100), mock.patch.object(kept, "SAVE_SECONDS", 0.0):
        try:
            return [fresh for _, fresh in evaluate_saes(job, out, [], world=world(ranks))], len(steps)
        except UserError as error:
            return type(error), str(error)


def evaluated_on_text(ranks, sae, text, out):
    return [one.fresh for one in evaluate_anywhere([str(sae)], Options(out, str(text), 900, batch_tokens=64),
                                                   world(ranks))]


def indexed(ranks, sae, out, text=None):
    with mock.patch.object(parts, "FEATURES_OF_A_PART", 40):
        return index_sae(str(sae), out=out, text=text and str(text), tokens=900, device="cpu",
                         world=world(ranks)).fresh


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".lock")}


def test_an_evaluation_of_a_store(pool, job, tmp_path):
    job, out = job
    outs = [shutil.copytree(out, tmp_path / str(count)) for count in (1, 2, 3)]
    path = run_folder(outs[0], job.saes[0]).relative_to(outs[0]) / EVALUATION
    steps = []
    for count, out in enumerate(outs, start=1):
        found = pool.run(count, evaluated, job, out)
        assert [fresh for fresh, _ in found] == [[True]] * count
        steps.append([number for _, number in found])
        assert pool.run(count, evaluated, job, out) == [([False], 0)] * count
        assert (out / path).read_bytes() == (outs[0] / path).read_bytes()
        assert not list(out.glob(".unfinished-*"))
    assert sum(steps[1]) == sum(steps[2]) == steps[0][0] and max(steps[2]) < 0.5 * steps[0][0]


def test_an_evaluation_of_a_text(pool, job, tmp_path):
    job, out = job
    text = out.parent / "corpus"
    for count in (1, 3):
        assert pool.run(count, evaluated_on_text, run_folder(out, job.saes[0]), text, tmp_path / str(count)) == [
            [True]] * count
    one, other = (files(tmp_path / count) for count in ("1", "3"))
    name = next(name for name in one if name.endswith(EVALUATION))
    assert one[name] == other[name]


def test_an_index(pool, job, tmp_path):
    job, out = job
    sae = run_folder(out, job.saes[0])
    for text in (None, out.parent / "corpus"):
        outs = [tmp_path / f"{count} {text is None}" for count in (1, 2, 3)]
        for count, folder in enumerate(outs, start=1):
            assert pool.run(count, indexed, sae, folder, text) == [True] * count
            assert pool.run(count, indexed, sae, folder, text) == [False] * count
        assert files(outs[0]) == files(outs[1]) == files(outs[2])


def test_what_fails_on_one_rank_is_told_by_that_one(pool, job, tmp_path):
    job, out = job
    out = shutil.copytree(out, tmp_path / "out")
    found = pool.run(3, evaluated, job, out, 1)
    assert found[1] == (UserError, "a segment is damaged")
    assert [found[0][0], found[2][0]] == [AnotherRankFailedError] * 2


def test_a_killed_rank_damages_nothing(job, tmp_path):
    job, out = job
    outs = [shutil.copytree(out, tmp_path / name) for name in ("whole", "killed")]
    pool = RankPool(tmp_path, 2)
    try:
        assert pool.run(1, evaluated, job, outs[0])[0][0] == [True]
        found = pool.run(2, evaluated, job, outs[1], None, 1)
        assert found[1] is None and "another process of this command has ended" in found[0][1]
        path = run_folder(outs[0], job.saes[0]).relative_to(outs[0]) / EVALUATION
        assert not (outs[1] / path).exists() and list(outs[1].glob(".unfinished-*"))
        fresh, _ = pool.run(1, evaluated, job, outs[1])[0]
        assert fresh == [True]
        assert (outs[1] / path).read_bytes() == (outs[0] / path).read_bytes()
    finally:
        pool.close()
