"""Files that safetensors reads, equal byte for byte to those that it writes."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmoscope.activations.store import tensors_file
from olmoscope.activations.store.tensors_file import write_tensors
from olmoscope.features.format import map_tensors

TENSORS = {
    "b": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "a": torch.arange(6, dtype=torch.int64),
    "z": torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    "half": torch.ones(4, 2, dtype=torch.float16),
    "bytes": torch.arange(9, dtype=torch.uint8),
    "eighth": torch.linspace(-400, 400, 12).reshape(4, 3).to(torch.float8_e4m3fn),
    "int": torch.arange(5, dtype=torch.int32),
    "float": torch.linspace(0, 1, 3),
}


@pytest.mark.parametrize("names", [["b"], ["a", "b"], ["z", "half", "bytes"], list(TENSORS)])
def test_the_bytes_are_those_of_safetensors(tmp_path, monkeypatch, names):
    monkeypatch.setattr(tensors_file, "PIECE", 16)
    tensors = {name: TENSORS[name] for name in names}
    digest = write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256(ours).hexdigest()
    read = load_file(tmp_path / "ours")
    assert all(torch.equal(read[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in names)


def test_part_of_a_longer_tensor(tmp_path):
    write_tensors(tmp_path / "part", {"b": TENSORS["b"][:3]})
    assert torch.equal(load_file(tmp_path / "part")["b"], TENSORS["b"][:3])


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (1,), (1, 1), ()])
def test_one_element_or_none_whatever_its_strides(tmp_path, shape):
    """Such tensors are contiguous with any strides, also those under which torch does not view them as bytes."""
    tensor = torch.ones(shape)
    for number, given in enumerate((tensor, tensor.as_strided(shape, [7] * len(shape)))):
        assert given.is_contiguous()
        path = tmp_path / str(number)
        digest = write_tensors(path, {"a": given, "z": TENSORS["z"]})
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert torch.equal(load_file(path)["a"], tensor) and torch.equal(load_file(path)["z"], TENSORS["z"])
        assert map_tensors(path)["a"].tolist() == tensor.tolist()


def test_nothing_appears_if_it_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_file, "PIECE", 8)
    calls = []

    def between():
        calls.append(1)
        if len(calls) == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write_tensors(tmp_path / "file", {"z": TENSORS["z"], "a": TENSORS["a"]}, between)
    assert not list(tmp_path.iterdir())
