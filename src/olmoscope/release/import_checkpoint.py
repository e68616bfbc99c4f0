"""Import: convert a checkpoint of the reference trainer to a SAELens folder (inference weights only)."""

from dataclasses import dataclass
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.sae.io import reference_trainer, saelens
from olmoscope.sae.io.place import Here
from olmoscope.sae.io.saelens_places import hook_names
from olmoscope.sae.normalize import Normalize
from olmoscope.sae.topk import TopK
from olmoscope.site import Site

UNIT = 1e-3
"""A row whose norm differs from 1 by more than this is reported; rounding to bfloat16 changes a norm by less."""


@dataclass(frozen=True)
class Imported:
    """What was imported: the folder, whether it had to be written, the SAE's settings, and notes for the reader."""

    folder: Path
    written: bool
    layer: int
    d_sae: int
    d_model: int
    k: int
    normalize: Normalize
    notes: list[str]


def import_checkpoint(path: Path, folder: Path, *, model_name: str, layer: int | None = None,
                      layers_path: str = "model.layers") -> Imported:
    """Write the SAE of a reference checkpoint into a folder, in SAELens' format.

    Args:
        path: the checkpoint file.
        folder: a new folder, or one into which this checkpoint was imported before (then nothing is written).
        model_name: the language model, which the checkpoint does not name.
        layer: needed only if the checkpoint does not say it.
        layers_path: where the model keeps its layers; the default is right for Llama-like models, including Olmo 3.

    Raises:
        UserError: see `reference_trainer.read`; or the folder holds another SAE.
    """
    if layer is not None and layer < 0:
        raise UserError(f"{path}: layer {layer} does not exist")
    opened = reference_trainer.read(Here(path), None if layer is None else Site(layer))
    sae = opened.sae
    assert isinstance(sae, TopK)
    metadata = {
        "model_name": model_name,
        **hook_names(layers_path, opened.site),
        "prepend_bos": False,
        "imported_from": path.name,
        "training": opened.metadata,
    }
    # A killed import leaves a weights file without cfg.json; that is not another SAE.
    if saelens.detect(Here(folder)) and not saelens.is_written(sae, folder, metadata):
        raise UserError(f"{folder} already holds another SAE, not that of {path}; import into a new folder")
    written = saelens.write(sae, folder, metadata)
    return Imported(folder, written, opened.site.layer, sae.d_sae, sae.d_model, sae.k, sae.normalize, _notes(sae))


def _notes(sae: TopK) -> list[str]:
    norms_F = sae.W_dec.norm(dim=1)
    off = int(((norms_F - 1).abs() > UNIT).sum())
    if not off:
        return []
    return [f"{off} of {sae.d_sae} decoder rows do not have unit norm ({float(norms_F.min()):.4g} to "
            f"{float(norms_F.max()):.4g}); they were kept as they are"]
