"""Blocks: readers get exactly what was written, and notice any damage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from olmoscope.activations.store.blocks import BLOCK_ROWS, checksum, checksums, read_blocks
from olmoscope.errors import UserError


def plain_checksum(content: bytes) -> int:
    """The formula of blocks.py, word by word."""
    content += bytes(-len(content) % 4096)
    return sum((2 * page + 1) * int.from_bytes(content[at : at + 8], "little")
               for page in range(len(content) // 4096) for at in range(4096 * page, 4096 * (page + 1), 8)) % 2**64


@settings(max_examples=25, deadline=None)
@given(size=st.integers(0, 20_000), seed=st.integers(0, 2**31))
def test_the_checksum_is_the_formula_and_sees_every_flip(size, seed):
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).numpy()
    before = checksum(content)
    assert int(before, 16) == plain_checksum(content.tobytes())
    for _ in range(20 if size else 0):
        place, bit = (int(torch.randint(0, high, (), generator=generator)) for high in (size, 8))
        content[place] ^= 1 << bit
        assert checksum(content) != before
        content[place] ^= 1 << bit


def test_lost_and_swapped_pages_are_seen():
    content = torch.randint(0, 256, (10 * 4096,), dtype=torch.uint8).numpy()
    before = checksum(content)
    swapped, lost = content.copy(), content.copy()
    swapped[:4096], swapped[8192:12288] = content[8192:12288], content[:4096]
    lost[4096:8192] = 0
    assert len({before, checksum(swapped), checksum(lost)}) == 3


@pytest.fixture
def path(tmp_path):
    (tmp_path / "layer_00").mkdir()
    return tmp_path / "layer_00" / "segment-000000.safetensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(700, 6), (256, 33), (1, 1), (513,)])
def test_any_slice_is_what_was_written(path, dtype, shape):
    rows = torch.randn(shape).to(dtype)
    save_file({"another": torch.zeros(3), "activations": rows}, path)
    sums = checksums(rows)
    assert len(sums) == -(-len(rows) // BLOCK_ROWS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        start, stop = sorted(torch.randint(0, len(rows) + 1, (2,), generator=generator).tolist())
        want = rows[start:stop].view(-1).view(torch.uint8)
        got = read_blocks(path, "activations", slice(start, stop), sums)
        out = torch.empty_like(rows[start:stop])
        assert read_blocks(path, "activations", slice(start, stop), sums, out) is out or start == stop
        assert torch.equal(got.view(-1).view(torch.uint8), want)
        assert torch.equal(out.view(-1).view(torch.uint8), want)


def test_any_flipped_bit_and_any_cut_of_the_file_is_named(path):
    rows = torch.randn(600, 16).bfloat16()
    save_file({"activations": rows}, path)
    sums, content = checksums(rows), path.read_bytes()
    generator = torch.Generator().manual_seed(1)
    header = 8 + int.from_bytes(content[:8], "little")
    for number in range(300):
        place = int(torch.randint(0, header if number < 150 else len(content), (), generator=generator))
        damaged = bytearray(content)
        damaged[place] ^= 1 << number % 8
        path.write_bytes(damaged)
        try:
            got = read_blocks(path, "activations", slice(0, 600), sums)
        except UserError as error:
            assert "is damaged" in str(error) and "\n" not in str(error)
        else:  # white space, or another tensor's name: the rows that were read are sound
            assert torch.equal(got, rows)
    for size in (0, 4, 20, header, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="is damaged"):
            read_blocks(path, "activations", slice(0, 256), sums)
