"""SAEs in other tools' formats are read back as the same SAE here; tests/foreign/read_back.py asks the tools."""

import pytest
import torch

from export_cases import CASES, coder, opened, rows, write
from feature_index import small_index
from olmoscope.errors import UserError
from olmoscope.release.convert import WRITERS, Choices, convert
from olmoscope.sae.io.open import open_sae


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_as_the_same_sae(case, tmp_path):
    made = coder(*CASES[case])
    folder = write(case.partition("/")[0], opened(made), tmp_path)
    stated = made.writes[0].part in ("", "mlp.out", "attn.out")  # dictionary_learning has no names for other sites
    found = open_sae(folder, None if stated else made.writes[0])
    assert (found.sae.reads, found.sae.writes) == (made.reads, made.writes)
    context = None if case.startswith("circuit-tracer") else 128  # its config.yaml has no place for it
    assert (found.model_name, found.context_size, found.sae.transcoder) == ("some/model", context, made.transcoder)
    x_BD = rows(made.b_out)
    (ours_BD, codes), (there_BD, there) = made.reconstruct(x_BD), found.sae.reconstruct(x_BD)
    if made.transcoder or case.endswith("jumprelu"):  # these classes subtract nothing: b_in is in another bias
        size_B1 = torch.cat([x_BD, ours_BD, codes.to_dense()], dim=1).abs().amax(dim=1, keepdim=True)
        assert float(((codes.to_dense() - there.to_dense()) / size_B1).abs().max()) < 1e-6
        assert float(((ours_BD - there_BD) / size_B1).abs().max()) < 1e-6
    else:
        assert torch.equal(codes.to_dense(), there.to_dense()) and torch.equal(ours_BD, there_BD)
    assert float(codes.to_dense().count_nonzero()) > 0


def test_another_format_again(tmp_path):
    first = WRITERS["sparsify"](opened(coder("topk", "same", "layers.3")), tmp_path / "one")
    second = convert(first, "dictionary-learning", tmp_path / "two").folder
    x_BD = rows(torch.zeros(16))
    assert torch.equal(open_sae(first).sae.reconstruct(x_BD)[0], open_sae(second).sae.reconstruct(x_BD)[0])
    for target, told in (("nothing", "--to nothing: no such format; choose one of saelens, sparsify, dictionary-"),
                         ("saelens", "is written only for Olmoscope runs: give their output folder")):
        with pytest.raises(UserError, match=told):
            convert(first, target, tmp_path / "three")


@pytest.mark.parametrize(("tool", "kind", "ends", "site", "normalize", "told"), [
    ("sparsify", "jumprelu", "same", "layers.3", "none", "sparsify has no class for this SAE, only the k largest"),
    ("dictionary-learning", "groupmax", "same", "layers.3", "none", "dictionary_learning has no class for this SAE"),
    ("dictionary-learning", "topk", "other", "layers.3.mlp.out", "none", "dictionary_learning has no class"),
    ("sparsify", "topk", "same", "layers.3", "layer_norm", r"sparsify does not normalise rows \(layer_norm\)"),
    ("sparsify", "topk", "same", "layers.3.mlp.in", "none", "layers.3.mlp.in is not the output of a module"),
    ("sparsify", "topk", "other", "layers.3.attn.out", "none", "transcoder of layers.3.attn.out reads layers.3.attn"),
])
def test_what_a_tool_cannot_express_is_refused(tool, kind, ends, site, normalize, told, tmp_path):
    with pytest.raises(UserError, match=told):
        WRITERS[tool](opened(coder(kind, ends, site, normalize)), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_an_index_and_tools_that_read_saelens_format_are_told_apart(tmp_path):
    index = small_index(tmp_path)
    made = convert(index, "documents", tmp_path / "documents")
    assert made.folder == tmp_path / "documents" and made.note.endswith(" entries")
    pages = convert(index, "circuit-tracer", tmp_path / "pages")
    assert pages.note == "pages of 512 features" and (tmp_path / "pages" / "features" / "layer_1.bin").is_file()
    for target, told in (("saebench", "it reads SAELens' format, so export without --to and give sae_lens.SAE"),
                         ("sae-probes", r"load_from_disk\(RUN/sae\) to sae_probes.run_sae_evals")):
        with pytest.raises(UserError, match=told):
            convert(index, target, tmp_path / "folder")
    with pytest.raises(UserError, match="--called is the name on Neuronpedia: give --to neuronpedia as well"):
        convert(index, "documents", tmp_path / "documents", choices=Choices(called="a/b"))
    with pytest.raises(UserError, match="--window is about Delphi's windows: give --to delphi as well"):
        convert(index, "documents", tmp_path / "documents", choices=Choices(window=64))
