"""What `olmoscope label --clamp` refuses: features that cannot be clamped, and text that is too short."""

from pathlib import Path

import pytest
import torch

from coders import parameters
from helpers import save_small_model
from little_index import D, F
from olmoscope.errors import UserError
from olmoscope.features.read import FeatureIndex
from olmoscope.features.rows_of import index_sae
from olmoscope.labelling.clamp import Clamping
from olmoscope.labelling.text_blocks import TextBlocks
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io import saelens
from olmoscope.sae.io.saelens_places import hook_names
from olmoscope.sae.threshold import JumpReLU
from olmoscope.site import Site
from olmoscope.train.initialize import initialize


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model("Llama", tmp_path_factory.mktemp("model"))


def blocks_of(sae: SparseCoder, reads: Site, writes: Site, model: Path, folder: Path, text: str) -> TextBlocks:
    """The blocks of text of a new index."""
    saelens.write(sae, folder / "sae", {
        "model_name": str(model), "hf_hook_name": None, "hf_hook_name_out": None, "prepend_bos": False,
        "context_size": 40} | hook_names("model.layers", reads) | hook_names("model.layers", writes, out=True))
    (folder / "text.txt").write_text(text)
    made = index_sae(str(folder / "sae"), text=str(folder / "text.txt"), out=folder / "index", device="cpu")
    return TextBlocks(FeatureIndex(made.folder))


def test_a_transcoder(model: Path, tmp_path: Path) -> None:
    reads, writes = Site(1, "mlp.in"), Site(1, "mlp.out")
    sae = JumpReLU.from_state_dict(parameters("jumprelu", D, D, F, ends="other", dtype=torch.float32),
                                   normalize="none", transcoder=True, reads=(reads,), writes=(writes,))
    blocks = blocks_of(sae, reads, writes, model, tmp_path, "A text of some words. " * 20)
    with pytest.raises(UserError, match="belongs to a transcoder or crosscoder, which does not write where it reads, "
                                        "so its features cannot be clamped; leave out --clamp"):
        Clamping(blocks, "cpu")


def test_a_text_that_is_too_short(model: Path, tmp_path: Path) -> None:
    sae = initialize(D, F, 4, "none", torch.zeros(D), seed=0)
    blocks = blocks_of(sae, Site(1), Site(1), model, tmp_path, "A text of some words.")
    with pytest.raises(UserError, match=r"no document of .* that labels are scored on has 32 tokens; index a longer "
                                        r"text, or leave out --clamp"):
        Clamping(blocks, "cpu")
