"""A reader of activation stores, written only from docs/formats.md: it imports nothing from olmoscope."""

import hashlib
import json
from pathlib import Path

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BF16": "<u2",
          "F8_E4M3": "u1"}


def tensor_file(path):
    """A tensor file as `{name: array}`, and its metadata; 8-bit and 16-bit floats that numpy lacks become float32."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensor = np.frombuffer(content[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            tensor = (tensor.astype("<u4") << 16).view("<f4")
        elif entry["dtype"] == "F8_E4M3":
            tensor = _e4m3(tensor)
        tensors[name] = tensor
    return tensors, metadata


def _e4m3(codes):
    """Decode a sign, 4 bits of exponent with bias 7, and 3 of mantissa; there are no infinities."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(float)
    small = mantissa / 8 * 2.0**-6
    return (sign * np.where(exponent == 0, small, (1 + mantissa / 8) * 2.0 ** (exponent - 7))).astype("<f4")


class StoreReader:
    """A finished store."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        assert self.manifest["format"] == "olmoscope activation store"
        assert self.manifest["version"] == 2, "newer than this reader"
        assert self.manifest["finished"]
        self.sources = list(self.manifest["sources"])

    def read(self, site_folder, segment):
        """Activations `[rows, D]` float32, and the facts about each row."""
        name = f"segment-{segment:06d}.safetensors"
        tensors, _ = tensor_file(self.folder / site_folder / name)
        activations = tensors["activations"].astype("<f4")
        if "scale" in tensors:
            activations = activations * tensors["scale"][:, None]
        return activations, tensor_file(self.folder / "rows" / name)[0]

    def tokens(self, segment):
        """The sequences of a segment: `{number: token ids}`."""
        tensors, _ = tensor_file(self.folder / "tokens" / f"segment-{segment:06d}.safetensors")
        starts = tensors["sequence_starts"]
        return {int(number): tensors["token_ids"][starts[s] : starts[s + 1]]
                for s, number in enumerate(tensors["sequence_numbers"])}

    def blocks_are_sound(self, site_folder, segment):
        """Whether every block of a site's file matches its checksum."""
        relative = f"{site_folder}/segment-{segment:06d}.safetensors"
        sums = json.loads((self.folder / "checksums" / f"segment-{segment:06d}.json").read_text())
        content = (self.folder / relative).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        for name, listed in sums["blocks"][relative].items():
            start, end = header[name]["data_offsets"]
            data = content[8 + length + start : 8 + length + end]
            size = len(data) // header[name]["shape"][0] * sums["block_rows"]
            for number, digest in enumerate(listed):
                block = data[number * size : (number + 1) * size]
                block += bytes(-len(block) % 4096)
                pages = np.frombuffer(block, "<u8").reshape(-1, 512)
                total = sum((2 * page + 1) * sum(map(int, words)) for page, words in enumerate(pages))
                if f"{total % 2**64:016x}" != digest:
                    return False
            if len(listed) * size < len(data):
                return False
        return True

    def sound(self, segment):
        """Whether all files of a segment match their checksums."""
        for listing in (f"tokens-{segment:06d}.json", f"segment-{segment:06d}.json"):
            sums = json.loads((self.folder / "checksums" / listing).read_text())["sha256"]
            for relative, digest in sums.items():
                if hashlib.sha256((self.folder / relative).read_bytes()).hexdigest() != digest:
                    return False
        return True
