"""An SAE's initial weights depend on seed and name, so that no two SAEs of a recipe start alike."""

import zlib

import numpy as np
import torch

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.sae.io.open import open_sae
from olmoscope.train.group import train_from_store
from olmoscope.train.initialize import initialize
from olmoscope.train.run import run_folder


def rows(name, seed=0, tied=True):
    return initialize(48, 200, 4, "none", torch.zeros(48), seed, name, tied=tied).W_dec


def largest_cosine(one_FD, other_FD):
    return float((torch.nn.functional.normalize(one_FD) @ torch.nn.functional.normalize(other_FD).T).max())


def test_rows_are_those_that_the_documentation_says():
    random = np.random.default_rng([7, zlib.crc32(b"rows of an SAE"), zlib.crc32(b"layer_01/width_200/topk_4_raw")])
    want_FD = random.standard_normal((200, 48), dtype=np.float32)
    want_FD /= np.linalg.norm(want_FD, axis=1, keepdims=True)
    torch.testing.assert_close(rows("layer_01/width_200/topk_4_raw", 7), torch.from_numpy(want_FD))


def test_rows_depend_on_seed_and_name_alone():
    assert torch.equal(rows("a"), rows("a", tied=False))
    for other in (rows("b"), rows("a", seed=1)):
        assert largest_cosine(rows("a"), other) < 0.8


def test_saes_of_equal_shape_start_apart(tmp_path):
    """Two SAEs of one layer trained together, and one of another layer: no initial direction occurs twice."""
    write_documents(tmp_path / "corpus")
    job = recipe(tmp_path / "corpus", saes=[{"layer": 1, "d_sae": 256, "k": 4},
                                            {"layer": 1, "d_sae": 256, "k": 4, "normalize": "layer_norm"},
                                            {"layer": 7, "d_sae": 256, "k": 4}], train__lr=1e-9)
    collect(job, "train", tmp_path / "store")
    list(train_from_store(job, job.saes, open_store(tmp_path / "store"), tmp_path))
    one, same_layer, other_layer = (open_sae(run_folder(tmp_path, sae)).sae.W_dec for sae in job.saes)
    assert largest_cosine(one, one) > 0.999
    assert largest_cosine(one, same_layer) < 0.5 and largest_cosine(one, other_layer) < 0.5
