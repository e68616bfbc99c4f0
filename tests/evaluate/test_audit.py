"""The audit names each way to spoil an SAE, gives good ones no warning, and gets every figure right.

A good SAE of the model in the package is trained here, in plain torch. F is D, so that a transposed matrix is square.
"""

import json
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import foreign_files as made
import olmoscope
from audit import SPOILED
from olmoscope.cli import app as cli
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.audit import audit, fvu
from olmoscope.evaluate.audit_rows import beside
from olmoscope.evaluate.audit_variants import misread, scaled, without_relu
from olmoscope.evaluate.audit_warnings import Found, Tried, warnings_of
from olmoscope.model.capture import read_sites
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import Model
from olmoscope.sae.io import saelens
from olmoscope.sae.io.open import find_saes, look_at
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.site import EMBED, Site
from olmoscope.tokens.tokenizer import load_tokenizer

D, F, K, SITE = 256, 256, 16, Site(3)
METADATA = {"model_name": "tiny", "model_revision": None, "hf_hook_name": None, "context_size": 128,
            "prepend_bos": False, "dataset_path": "test"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in ("files.py", "site.py", "pipeline.py"):
        (folder / name).write_text(resources.files("olmoscope").joinpath(name).read_text())
    return folder


@pytest.fixture(scope="module")
def good(text):
    """A TopK SAE of layers.3, the median norm of its rows, and the rows."""
    model = load_model(Model(name="tiny", dtype="float32"), [SITE], torch.device("cpu"))
    ids = load_tokenizer(Model(name="tiny")).backend.encode("".join(
        path.read_text() for path in sorted(text.iterdir()))).ids
    ids_BT = torch.tensor(ids[:len(ids) // 128 * 128]).view(-1, 128)
    x_ND = read_sites(model.module, [model.sites.places[SITE]], ids_BT)[SITE][:, 1:].reshape(-1, D)
    torch.manual_seed(0)
    mean_D, scale = x_ND.mean(0), float(x_ND.norm(dim=1).median())
    u_ND = (x_ND - mean_D) / scale
    W_dec = torch.nn.functional.normalize(torch.randn(F, D), dim=1).requires_grad_()
    W_enc = W_dec.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([W_enc, W_dec], 3e-3)
    for _ in range(120):
        x_BD = u_ND[torch.randint(len(u_ND), (512,))]
        values_BK, indices_BK = (x_BD @ W_enc.T).topk(K)
        z_BF = torch.zeros(len(x_BD), F).scatter(1, indices_BK, values_BK.relu())
        loss = (x_BD - z_BF @ W_dec).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sae = TopK(W_enc.detach() / scale, W_dec.detach() * scale, mean_D, "none", torch.zeros(F), K)
    return sae, scale, x_ND


def written(folder, sae, site=SITE, **metadata):
    saelens.write(sae, folder, METADATA | {"hook_name": site.transformer_lens} | metadata)
    return str(folder)


def thresholded(sae, x_ND):
    """A JumpReLU that fires as often."""
    p_NF = sae.center(x_ND)[0] @ sae.W_enc.T
    return JumpReLU(sae.W_enc, sae.W_dec, sae.b_in, "none", sae.b_latent,
                    p_NF.flatten().topk(K * len(x_ND)).values[-1].expand(F).contiguous())


def test_what_is_wrong_is_named(good, text, tmp_path):
    sae, _, x_ND = good
    paths = {name: written(tmp_path / str(number), *make(sae, SITE, x_ND))
             for number, (name, (_, make)) in enumerate(SPOILED.items())}
    paths["good"] = written(tmp_path / "good", sae, l0=K)
    paths["good JumpReLU"] = written(tmp_path / "good JumpReLU", thresholded(sae, x_ND))
    found = audit(list(paths.values()), Options(tmp_path / "out", str(text), 2048, dtype="float32"))
    said = {name: [warning.kind for warning in one.warnings] for name, one in zip(paths, found, strict=True)}
    assert said.pop("good") == said.pop("good JumpReLU") == []
    for name, (wanted, _) in SPOILED.items():
        assert {*said[name]} & {*wanted}, (name, said[name])
    best = dict(zip(paths, (one.tried[0].what for one in found), strict=True))
    assert best["layer before"] == best["layer after"] == best["mlp_out for resid_post"] == "layers.3"
    assert "mean norm √D" in best["scale not folded"]
    assert (best["decoder transposed"], best["encoder transposed"]) == ("W_dec transposed", "W_enc transposed")
    sound = next(one for name, one in zip(paths, found, strict=True) if name == "good")
    assert sound.l0 == K and sound.stated == {"L0": K} and sound.rows == 2048 and sound.reads == ("layers.3",)
    assert sound.fit < sound.tried[0].fvu and sound.explained_variance > 0.3


def test_the_command(good, text, tmp_path, monkeypatch, capsys):
    sae, norm, _ = good
    paths = [written(tmp_path / "one", scaled(sae, norm / D**0.5), l0=3), written(tmp_path / "two", sae, Site(4))]

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["olmoscope", "audit", *paths, "--text", str(text), "--tokens", "600",
                                          "--dtype", "float32", "-o", str(tmp_path / "out"), *options])
        monkeypatch.setenv("COLUMNS", "100")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    shown = " ".join(call().split())
    for words in ("SAE EV EV ord. L0 dead warnings", "verdict 2 warnings",
                  "warning the scale of its training rows is missing: it fits with rows multiplied by",
                  "its owner states 3", "Check the language model, BOS and the text.",
                  "it is probably of another site: it fits layers.3, with FVU", "Correct the site in its settings"):
        assert words in shown, shown
    one, two = json.loads(call("--json"))
    assert [warning["kind"] for warning in one["warnings"]] == ["scale", "stated"]
    assert two["tried"][0]["what"] == "layers.3" and two["outlier_nmse"] is None


def test_fvu_and_variants(good):
    sae, _, x_ND = good
    xhat_ND = sae.reconstruct(x_ND)[0]
    expected = (x_ND - xhat_ND).double().square().sum() / (x_ND.double() - x_ND.double().mean(0)).square().sum()
    assert fvu(sae, x_ND, x_ND) == pytest.approx(float(expected), rel=1e-9)
    assert fvu(sae, x_ND, torch.ones_like(x_ND)) is None
    torch.testing.assert_close(scaled(sae, 4.0).reconstruct(x_ND)[0], sae.reconstruct(4 * x_ND)[0] / 4)
    both = without_relu(sae).reconstruct(x_ND[:5])[0]
    p_NF = sae.center(x_ND[:5])[0] @ sae.W_enc.T
    kept_NK = p_NF.abs().topk(K).indices
    z_NF = torch.zeros_like(p_NF).scatter(1, kept_NK, p_NF.gather(1, kept_NK))
    torch.testing.assert_close(both, z_NF @ sae.W_dec + sae.b_out, rtol=1e-4, atol=1e-3)
    W_FD = torch.arange(6.0).view(3, 2)
    assert torch.equal(misread(W_FD), torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    assert torch.equal(misread(torch.eye(2).roll(1, 0) * 2), torch.eye(2).roll(1, 0) * 2)


def test_sites_beside():
    assert beside(EMBED, 8) == [Site(0), Site(1)]
    assert set(beside(Site(0), 2)) == {EMBED, Site(1), *(Site(0, part) for part in (
        "attn.in", "attn.z", "attn.out", "mid", "mlp.in", "mlp.out"))}
    assert {Site(2, "mlp.out"), Site(6, "mlp.out"), Site(3), Site(4), Site(5)} < set(beside(Site(4, "mlp.out"), 8))


def found(**changes):
    usual = {"fit": 0.2, "tried": (Tried("site", "layers.4", "do it", 0.25),), "l0": 8.0, "d_in": 64, "d_sae": 512,
             "twins": 0.5, "explained": 0.8, "stated": {}}
    return [warning.kind for warning in warnings_of(Found(**usual | changes))]


@pytest.mark.parametrize(("changes", "kinds"), [
    ({}, []),
    ({"tried": (Tried("bias", "b", "do", 0.15),)}, ["bias"]),
    ({"fit": None}, ["site"]),
    ({"fit": 3.0, "tried": (Tried("scale", "s", "do", 0.75),), "explained": -2.0}, ["misfit"]),
    ({"fit": None, "tried": (), "explained": None}, ["misfit"]),
    ({"explained": 0.1}, ["misfit"]),
    ({"explained": 0.1, "twins": 0.01}, ["mismatch"]),
    ({"l0": 0.0}, ["silent"]),
    ({"l0": 65.0}, ["dense"]),
    ({"stated": {"L0": 17, "explained variance": 0.9}}, ["stated"]),
    ({"stated": {"L0": 15, "explained variance": 0.6}}, ["stated"]),
])
def test_warnings(changes, kinds):
    assert found(**changes) == kinds


def test_what_cannot_be_audited(good, text, tmp_path):
    path = written(tmp_path / "sae", good[0])
    with pytest.raises(UserError, match="give --text"):
        audit([path], Options(tmp_path / "out"))
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(UserError, match="give a longer text"):
        audit([path], Options(tmp_path / "out", str(tmp_path / "short.txt"), dtype="float32"))


def test_bad_input_is_the_same_line_for_every_command(tmp_path):
    made.llama_scope(tmp_path, d_sae=7)
    torch.save({"module": torch.nn.Linear(2, 2)}, tmp_path / "code.pt")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/notes.txt").write_text("no SAE")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    options = Options(tmp_path / "out", str(tmp_path / "unknown"), 100)
    for address, message in ((tmp_path / "unknown", "holds no finished run and no SAE of another format"),
                             (tmp_path / "other.safetensors", "has an unknown format: it holds other; give the folder"),
                             (tmp_path / "code.pt", "it is a pickle that would execute code of its own"),
                             (tmp_path / "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x",
                              "d_sae is 7, but the tensors have 48"),
                             (tmp_path / "missing", "does not exist"), ("saelens:nope/one", "has no release 'nope'")):
        for command in (lambda name: look_at(find_saes(name)[0]), olmoscope.load,
                        lambda name: evaluate_anywhere([name], options), lambda name: audit([name], options)):
            with pytest.raises(UserError, match=message) as refusal:
                command(str(address))
            assert "\n" not in str(refusal.value)
