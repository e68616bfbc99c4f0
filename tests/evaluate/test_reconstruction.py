"""Every figure against a dense float64 computation and against SAELens's own; the same for any batch size."""

import numpy as np
import pytest
import torch

from olmoscope.errors import UserError
from olmoscope.evaluate.reconstruction import RandomDirections, Reconstruction
from olmoscope.evaluate.subsets import SUBSETS, LayerSurvey, RowFacts
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.normalize import normalize_rows, restore_rows
from olmoscope.sae.topk import TopK
from olmoscope.site import Site
from olmoscope.train.initialize import initialize

ROWS, D, F, K = 500, 24, 96, 6


def subject(normalize):
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(ROWS, D, generator=generator) * torch.linspace(0.5, 3, D) + 2
    x_BD[3::97] *= 50  # outliers
    mean_D = normalize_rows(x_BD, normalize)[0].mean(0)
    sae = initialize(D, F, K, normalize, mean_D, seed=1)
    sae.b_latent[:40] -= 1e4  # never active
    sae.b_latent[40:60] += torch.randn(20, generator=generator)
    return sae, x_BD


def facts_of(rows):
    """Ten documents of rows; every seventh token special; sequences of 25."""
    index = torch.arange(rows)
    return RowFacts(index // (ROWS // 10), index % 25, index % 7 == 0, (index // 100 % 4).to(torch.uint8))


def survey_of(x_BD):
    return LayerSurvey.of(x_BD.double().mean(0), x_BD.double().norm(dim=1).numpy())


def reconstruction(sae, x_BD):
    return Reconstruction(sae, survey_of(x_BD), 10)


def part(facts, rows):
    return RowFacts(*(tensor[rows] for tensor in vars(facts).values()))


def measure(sae, x_BD, batch):
    measured, facts = reconstruction(sae, x_BD), facts_of(len(x_BD))
    for start in range(0, len(x_BD), batch):
        rows = slice(start, start + batch)
        measured.add(x_BD[rows], part(facts, rows))
    return measured


def figures_of(measured):
    """All figures as one dict, those of subsets under their names."""
    distributions = {name: value.model_dump() if hasattr(value, "model_dump") else
                     {str(place): each.model_dump() for place, each in enumerate(value)}
                     for name, value in measured.distributions().items()}
    return measured.subset("all") | distributions | {name: measured.subset(name) for name in SUBSETS[1:]}


def dense_figures(sae: TopK, x_BD, rows=slice(None)):
    """The definitions, word for word, dense and in float64, on some of the rows."""
    x_BD = x_BD[rows]
    W, b, pre, x = (t.double() for t in (sae.W_dec, sae.b_latent, sae.b_in, x_BD))
    n, statistics = normalize_rows(x, sae.normalize)
    scores = (n - pre) @ W.T + b
    top = scores.topk(sae.k, dim=1)
    z = torch.zeros_like(scores).scatter(1, top.indices, top.values).relu()
    xhat = restore_rows(z @ W + pre, statistics)
    error2, x2 = (x - xhat).square().sum(1), x.square().sum(1)
    density = (z > 0).double().mean(0)
    return {
        "rows": len(x),
        "fvu": error2.sum() / (x - x.mean(0)).square().sum(),
        "explained_variance": 1 - error2.sum() / (x - x.mean(0)).square().sum(),
        "nmse": (error2 / x2).mean(),
        "cosine": torch.cosine_similarity(x, xhat, dim=1).mean(),
        "l2_ratio": (xhat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": xhat.square().sum(1).mean() / (x * xhat).sum(1).mean(),
        "l0.mean": (z > 0).sum(1).double().mean(),
        "l0.p50": np.percentile((z > 0).sum(1).numpy(), 50, method="higher"),
        "l1": z.sum(1).mean(),
        "dead.share": (density == 0).double().mean(),
        "density.over_1_percent": (density > 0.01).double().mean(),
        "density.over_10_percent": (density > 0.1).double().mean(),
    }


def flat(figures, prefix=""):
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield from ((f"{prefix}{name}.{place}", each) for place, each in enumerate(value))
        else:
            yield prefix + name, value


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_equals_a_dense_computation(normalize):
    sae, x_BD = subject(normalize)
    measured = figures_of(measure(sae, x_BD, 64))
    figures = dict(flat(measured))
    for name, want in dense_figures(sae, x_BD).items():
        assert figures[name] == pytest.approx(float(want), rel=1e-5), name
    assert sum(measured["density"]["latents"]) == F
    assert measured["density"]["latents"][0] == round(figures["dead.share"] * F) >= 40
    l0 = measured["l0"]
    assert sum(l0["rows"]) == ROWS
    assert np.average(l0["values"], weights=l0["rows"]) == pytest.approx(l0["mean"])


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_subsets_equal_a_dense_computation_on_their_rows(normalize):
    sae, x_BD = subject(normalize)
    figures, facts, norm_B = figures_of(measure(sae, x_BD, 64)), facts_of(ROWS), x_BD.norm(dim=1)
    usual_B = norm_B <= 10 * norm_B.median()
    rows = {"without_special": ~facts.special_R, "without_first": facts.position_R > 0, "without_outliers": usual_B,
            "ordinary": ~facts.special_R & (facts.position_R > 0) & usual_B, "prompt": facts.part_R == 1,
            "thinking": facts.part_R == 2, "answer": facts.part_R == 3}
    assert set(rows) == set(SUBSETS[1:])
    for name, which_B in rows.items():
        assert 0 < int(which_B.sum()) < ROWS, name
        dense = dense_figures(sae, x_BD, which_B)
        for key in ("rows", "fvu", "explained_variance", "nmse", "cosine", "l2_ratio", "relative_reconstruction_bias",
                    "l1"):
            assert figures[name][key] == pytest.approx(float(dense[key]), rel=1e-5), (name, key)
        assert figures[name]["l0"] == pytest.approx(float(dense["l0.mean"]))


def test_positions_and_norms():
    """The bins hold all rows, and their means are those of the rows in them."""
    sae, x_BD = subject("none")
    measured = measure(sae, x_BD, 64)
    found = measured.distributions()
    x, xhat = x_BD.double(), sae.reconstruct(x_BD)[0].double()
    norm_B, nmse_B = x.norm(dim=1), (x - xhat).square().sum(1) / x.square().sum(1)
    position_B = facts_of(ROWS).position_R
    assert [(each.first, each.last) for each in found["by_position"]] == [
        (0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
    for each in found["by_position"]:
        inside_B = (position_B >= each.first) & (position_B <= each.last)
        assert each.rows == int(inside_B.sum())
        assert each.norm == pytest.approx(float(norm_B[inside_B].mean()))
        assert each.nmse == pytest.approx(float(nmse_B[inside_B].mean()), rel=1e-5)
    tenths = found["by_norm"]
    assert [each.rows for each in tenths] == [ROWS // 10] * 10
    assert (tenths[0].low, tenths[-1].high) == (pytest.approx(float(norm_B.min())), pytest.approx(float(norm_B.max())))
    for place, each in enumerate(tenths):
        rows = norm_B.argsort()[place * ROWS // 10 : (place + 1) * ROWS // 10]
        assert each.nmse == pytest.approx(float(nmse_B[rows].mean()), rel=1e-5)
        assert each.share_of_error == pytest.approx(
            float((x - xhat)[rows].square().sum() / (x - xhat).square().sum()), rel=1e-5)
    assert sum(each.share_of_variance for each in tenths) == pytest.approx(1)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_does_not_depend_on_the_batch_size(normalize):
    sae, x_BD = subject(normalize)
    whole = dict(flat(figures_of(measure(sae, x_BD, 4096))))
    for batch in (1, 7):
        for name, value in flat(figures_of(measure(sae, x_BD, batch))):
            # The explained variance is 1 − FVU: near 0 it has the FVU's rounding.
            assert value == pytest.approx(whole[name], rel=1e-6, abs=1e-7), name


def test_sums_do_not_depend_on_the_batch_size_to_the_last_bits():
    """Given the same reconstructions (float32 products differ by rounding from batch to batch)."""
    sae, x_BD = subject("none")
    xhat_BD, codes = sae.reconstruct(x_BD)
    facts, found = facts_of(ROWS), []
    for batch in (1, 7, 4096):
        measured = reconstruction(sae, x_BD)
        for start in range(0, ROWS, batch):
            rows = slice(start, start + batch)
            measured.add_reconstruction(x_BD[rows], xhat_BD[rows], SparseCodes(
                codes.values[rows], codes.indices[rows], F), part(facts, rows))
        found.append(dict(flat(figures_of(measured))))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-12)


def test_an_interval_holds_the_figure_and_narrows_with_the_documents():
    sae, x_BD = subject("none")
    widths = []
    for documents in (5, 50):
        measured = Reconstruction(sae, survey_of(x_BD), documents)
        index = torch.arange(ROWS)
        measured.add(x_BD, RowFacts(index * documents // ROWS, index % 25, index < 0, torch.zeros_like(index)))
        figures = measured.subset("all")
        for name, (low, high) in figures["intervals"].items():
            assert low <= figures[name] <= high, name
        low, high = figures["intervals"]["nmse"]
        widths.append((high - low) / figures["nmse"])
        assert measured.subset("prompt") is None
    # Rows are independent here: the error of a mean is its rows' deviation over the root of their number.
    nmse_B = ((x_BD - sae.reconstruct(x_BD)[0]).square().sum(1) / x_BD.square().sum(1)).double()
    expected = 2 * 1.96 * float(nmse_B.std() / nmse_B.mean()) / ROWS**0.5
    assert widths[1] == pytest.approx(expected, rel=0.35)
    alone = Reconstruction(sae, survey_of(x_BD), 1)
    alone.add(x_BD, RowFacts(torch.zeros_like(index), index, index < 0, torch.zeros_like(index)))
    assert alone.subset("all")["intervals"] == {}


def test_explained_variance_equals_saelens(tmp_path):
    """SAELens: 1 − E‖x − x̂‖² / (E‖x‖² − ‖E x‖²), on its own encode and decode."""
    from sae_lens import SAE

    from olmoscope.sae.io import saelens
    from olmoscope.sae.io.saelens_places import hook_names

    for normalize in ("none", "layer_norm"):
        sae, x_BD = subject(normalize)
        metadata = {"model_name": "m", "prepend_bos": False, **hook_names("model.layers", Site(0))}
        saelens.write(sae, tmp_path / normalize, metadata)
        theirs = SAE.load_from_disk(tmp_path / normalize)
        with torch.no_grad():
            xhat_BD = theirs(x_BD).double()
        x = x_BD.double()
        residual = (x - xhat_BD).square().sum(1).mean()
        want = 1 - residual / (x.square().sum(1).mean() - x.mean(0).square().sum())
        assert measure(sae, x_BD, 64).subset("all")["explained_variance"] == pytest.approx(float(want), rel=1e-5)


def test_perfect_and_empty_reconstructions():
    sae, x_BD = subject("none")
    codes, facts = sae.encode(x_BD), facts_of(ROWS)

    def figures(xhat_BD):
        measured = reconstruction(sae, x_BD)
        measured.add_reconstruction(x_BD, xhat_BD, codes, facts)
        return measured.subset("all")

    perfect = figures(x_BD)
    assert (perfect["fvu"], perfect["nmse"]) == (0, 0)
    assert perfect["cosine"] == pytest.approx(1)
    assert figures(x_BD.double().mean(0).expand_as(x_BD))["fvu"] == pytest.approx(1)
    zero = figures(torch.zeros_like(x_BD))
    assert zero["nmse"] == 1
    assert zero["relative_reconstruction_bias"] is None


def with_zeros(normalize):
    """Like `subject`, but with two rows of zeros: one at the start of a document, one in the middle."""
    sae, x_BD = subject(normalize)
    x_BD[[50, 123]] = 0
    return sae, x_BD


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_rows_of_zeros_have_no_nmse_and_no_cosine_but_count_for_the_rest(normalize):
    sae, x_BD = with_zeros(normalize)
    for batch in (1, 64):
        measured = measure(sae, x_BD, batch)
        figures = figures_of(measured)
        x, xhat = x_BD.double(), sae.reconstruct(x_BD)[0].double()
        error2_B, x2_B, xhat2_B = (x - xhat).square().sum(1), x.square().sum(1), xhat.square().sum(1)
        some_B = x2_B > 0
        assert (figures["rows"], figures["zero_rows"], int(some_B.sum())) == (ROWS, 2, ROWS - 2)
        assert figures["nmse"] == pytest.approx(float((error2_B / x2_B)[some_B].mean()), rel=1e-5)
        assert figures["cosine"] == pytest.approx(
            float(torch.cosine_similarity(x, xhat, dim=1)[some_B].mean()), rel=1e-5)
        assert figures["l2_ratio"] == pytest.approx(float((xhat2_B / x2_B).sqrt()[some_B].mean()), rel=1e-5)
        assert figures["fvu"] == pytest.approx(float(error2_B.sum() / (x - x.mean(0)).square().sum()), rel=1e-5)
        assert sum(figures["l0"]["rows"]) == figures["dead"]["window"] == ROWS
        for name, low_high in figures["intervals"].items():
            assert low_high[0] <= (figures["l0"]["mean"] if name == "l0" else figures[name]) <= low_high[1], name
        assert all(np.isfinite(value) for _, value in flat(figures) if value is not None)
        # Row 123 is at position 23, in the last bin; row 50 at position 0: 20 rows, 19 of them with a norm.
        first, norm_first_B = figures["by_position"]["0"], some_B & (facts_of(ROWS).position_R == 0)
        assert (first["rows"], int(norm_first_B.sum())) == (20, 19)
        assert first["nmse"] == pytest.approx(float((error2_B / x2_B)[norm_first_B].mean()), rel=1e-5)
        smallest = figures["by_norm"]["0"]
        tenth_B = x2_B.argsort()[:ROWS // 10]
        assert (smallest["low"], smallest["rows"]) == (0, ROWS // 10)
        assert smallest["nmse"] == pytest.approx(float((error2_B / x2_B)[tenth_B[2:]].mean()), rel=1e-5)
        assert figures["without_first"]["zero_rows"] == 1


def test_a_subset_of_zeros_alone_has_rows_and_nothing_in_units_of_their_norm():
    sae, x_BD = subject("none")
    x_BD[:50] = 0
    measured = reconstruction(sae, x_BD)
    rows = torch.arange(ROWS)
    measured.add(x_BD, RowFacts(rows // 50, (rows >= 50).long(), rows < 0, (rows < 50).to(torch.uint8)))
    zeros = measured.subset("prompt")
    assert (zeros["rows"], zeros["zero_rows"]) == (50, 50)
    for name in ("nmse", "cosine", "l2_ratio", "fvu", "explained_variance"):
        assert zeros[name] is None and name not in zeros["intervals"], name
    assert zeros["l0"] > 0
    assert [each.nmse is None for each in measured.distributions()["by_position"]] == [True, False]
    assert [each.nmse is None for each in measured.distributions()["by_norm"]] == [True] + [False] * 9
    one = reconstruction(sae, x_BD)
    one.add(x_BD[60:62], RowFacts(torch.zeros(2).long(), torch.arange(2), torch.zeros(2) > 0, torch.tensor([1, 0])))
    assert one.subset("prompt")["fvu"] is None and one.subset("prompt")["nmse"] > 0, "one row has no variance"


def test_rows_that_are_not_finite_are_refused_at_once():
    sae, x_BD = subject("none")
    x_BD[7, 3] = torch.nan
    with pytest.raises(UserError, match="a name: 1 of 64 rows or their reconstructions are NaN or infinite"):
        Reconstruction(sae, survey_of(x_BD.nan_to_num()), 10, "a name").add(x_BD[:64], part(facts_of(ROWS), slice(64)))
    with pytest.raises(UserError, match=r"layer 3: 1 of 500 rows are NaN or infinite; try another precision"):
        LayerSurvey.refusing(x_BD.double().mean(0), x_BD.norm(dim=1).numpy(), "layer 3")
    with pytest.raises(UserError, match="layer 3: all 500 rows are zeros"):
        LayerSurvey.refusing(x_BD[0].double(), np.zeros(500), "layer 3")


def test_random_directions_leave_their_share():
    """k of d random directions catch k/d of an isotropic variance."""
    x_BD = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    values = [RandomDirections(64, 16, seed).nmse(x_BD, x_BD.mean(0)) for seed in range(5)]
    assert np.mean(values) == pytest.approx(1 - 16 / 64, abs=0.01)
    with_a_zero = torch.cat([x_BD, torch.zeros(1, 64)])
    assert RandomDirections(64, 16, 0).nmse(with_a_zero, x_BD.mean(0)) == pytest.approx(values[0])
    assert RandomDirections(64, 16, 0).nmse(with_a_zero[-1:], x_BD.mean(0)) is None
