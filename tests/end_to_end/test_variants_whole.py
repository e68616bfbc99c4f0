"""SAEs of every exportable activation through all stages: trained, measured, released, validated on held-out rows."""

from helpers import recipe, write_documents
from olmoscope.evaluate.results import read_evaluation
from olmoscope.pipeline import collect_stores, evaluate_saes, train_saes, validate_folder
from olmoscope.release.build import build_release


def test_variants_go_the_whole_way(tmp_path):
    write_documents(tmp_path / "corpus", count=120)
    base = {"layer": 1, "d_sae": 256, "k": 8}
    job = recipe(tmp_path / "corpus", tokens__count=6000, evaluate={"tokens": 256}, saes=[
        base | {"activation": "batchtopk", "matryoshka": [0.25]}, base | {"activation": "jumprelu"}])
    out = tmp_path / "out"
    collect_stores(job, out)
    assert [fresh for _, fresh in train_saes(job, out, [])] == [True, True]
    assert [fresh for _, fresh in evaluate_saes(job, out, [])] == [True, True]
    build_release(out)
    validation = validate_folder(out)
    assert validation.passed and all(check.passed for check in validation.checks), validation.failures
    for sae in job.saes:
        found = read_evaluation(out / "runs" / sae.id / "evaluation.json")
        assert found.architecture == "jumprelu" and found.k is None
        assert 4 < found.l0.mean < 16 and found.l0.p5 < found.l0.p95
        assert 0 < found.fvu < 0.9
