"""circuit-tracer's feature pages: its schema and offsets, figures equal to the index's."""

import gzip
import json
import shutil
import zlib

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from feature_index import small_index
from olmoscope.errors import UserError
from olmoscope.features.feature_pages import write_pages
from olmoscope.features.read import FeatureIndex


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Example(_Strict):
    """The fields of circuit-tracer 0.4.1, `frontend/feature_models.py`."""

    tokens_acts_list: list[float]
    train_token_ind: int
    is_repeated_datapoint: bool
    tokens: list[str]


class Quantile(_Strict):
    quantile_name: str
    examples: list[Example]


class Page(_Strict):
    transcoder_id: str
    index: int
    examples_quantiles: list[Quantile]
    top_logits: list[str]
    bottom_logits: list[str]
    act_min: float
    act_max: float
    quantile_values: list[float]
    histogram: list[float]
    activation_frequency: float


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return FeatureIndex(small_index(tmp_path_factory.mktemp("index")))


@pytest.fixture(scope="module")
def written(index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    assert write_pages([index], folder) == 512
    return folder


def test_every_feature_has_its_page(index, written):
    table = json.loads(gzip.decompress((written / "features" / "index.json.gz").read_bytes()))
    assert list(table) == [str(index.info.sae.layer)]
    entry = table[str(index.info.sae.layer)]
    content, offsets = (written / "features" / entry["filename"]).read_bytes(), entry["offsets"]
    assert (len(offsets), offsets[0], offsets[-1]) == (513, 0, len(content))
    for number, start in enumerate(offsets[:-1]):
        length = int.from_bytes(content[start : start + 4], "little")
        assert start + 4 + length == offsets[number + 1]
        page = Page.model_validate_json(zlib.decompress(content[start + 4 : start + 4 + length]))
        feature, values = index.feature(number), index.firing_values(number)[1]
        assert (page.index, page.act_max, page.activation_frequency) == (number, feature.max, feature.density)
        assert sum(page.histogram) == feature.rows
        assert page.top_logits == [one.token.text for one in feature.promoted]
        assert page.bottom_logits == [one.token.text for one in feature.suppressed]
        if not feature.rows:
            assert (page.examples_quantiles, page.quantile_values, page.histogram) == ([], [], [])
            continue
        assert len(page.quantile_values) == 100 and page.quantile_values[-1] == feature.max
        assert page.quantile_values[49] == pytest.approx(float(np.median(values)))
        top, *intervals = page.examples_quantiles
        wanted = [feature.top, *(one.examples for one in reversed(feature.intervals) if one.examples)]
        assert len(wanted) == 1 + len(intervals)
        for group, examples in zip(page.examples_quantiles, wanted, strict=True):
            for shown, example in zip(group.examples, examples, strict=True):
                window = index.window(example)
                assert shown.tokens == [token.text for token in window.tokens]
                assert shown.tokens_acts_list == window.activations
                assert shown.tokens_acts_list[shown.train_token_ind] == example.value
        assert not any(shown.is_repeated_datapoint for shown in top.examples)


def test_layers_are_written_one_by_one_and_pages_of_another_layer_stay(index, written, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(index.path, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["sae"] |= {"site": "layers.5", "layer": 5}
    (other / "manifest.json").write_text(json.dumps(manifest))
    write_pages([FeatureIndex(other)], written)
    path = written / "features" / "index.json.gz"
    assert list(json.loads(gzip.decompress(path.read_bytes()))) == [str(index.info.sae.layer), "5"]
    with pytest.raises(UserError, match="circuit-tracer wants one SAE for each layer"):
        write_pages([index, index], written)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"index.json.gz is damaged .*; delete .*features and export all layers again"):
        write_pages([index], written)
