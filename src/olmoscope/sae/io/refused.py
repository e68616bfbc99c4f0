"""Kinds of dictionary that are not read: what each one is, and what to do with it.

Sources: sae-lens 6.54.12, `saes/temporal_sae.py` and `saes/matching_pursuit_sae.py`; llamascopium 2.0.0b34, `models/`;
science-of-finetuning's crosscoder_learning (encoder `[places, D, F]`, decoder `[places, F, D]`).
"""

from collections.abc import Collection

from olmoscope.errors import UserError
from olmoscope.sae.io.place import Place

_CROSSCODER = ("a crosscoder, which reads several layers or models at once: only crosscoders that Olmoscope trained "
               "are read; use the tool that wrote it, or train one here (`reads` in a recipe)")

KINDS = {
    "temporal": "a temporal SAE, whose codes depend on earlier tokens of the sequence: use SAELens for it, since here "
                "each row is encoded by itself",
    "matching_pursuit": "a matching-pursuit SAE, which picks latents one after another, each from what the ones before "
                        "it leave over: use SAELens for it, since here all latents are picked at once",
    "lorsa": "a low-rank sparse attention module (LoRSA), whose codes depend on earlier tokens of the sequence: use "
             "Llamascopium for it",
    "molt": "a mixture of linear transforms (MOLT), whose latents are linear maps and not directions: use "
            "Llamascopium for it",
    "clt": "a cross-layer transcoder in one file: use Llamascopium for it, or one of circuit-tracer's files for each "
           "layer (W_enc_L.safetensors)",
    "crosscoder": _CROSSCODER,
    "CrossCoder": _CROSSCODER,
    "BatchTopKCrossCoder": _CROSSCODER,
}
"""By the name that its settings give it."""


def refuse_kind(where: str, key: str, name: object, supported: Collection[str]) -> None:
    """Refuse a kind of dictionary that is not read.

    Args:
        where: the file with its settings.
        key: the setting that names the kind.
        supported: the kinds that are read.

    Raises:
        UserError: `name` is not among them.
    """
    if name in supported:
        return
    if (what := KINDS.get(str(name))) is not None:
        raise UserError(f"{where}: {key} {name!r}: it is {what}")
    raise UserError(f"{where}: {key} {name!r} is not supported; supported {'are' if len(supported) > 1 else 'is'} "
                    f"{', '.join(supported)}")


def refuse_crosscoder(place: Place) -> None:
    """Refuse a crosscoder that no settings name: its encoder has a matrix for each place that it reads.

    Raises:
        UserError: it is one.
    """
    file = place.file or place.only(".safetensors") or place.only(".pt")
    if file is None or not file.endswith((".safetensors", ".pt", ".pth")):
        return
    shapes = place.header(file).shapes
    if all(len(shapes.get(f"{part}.weight", ())) == 3 for part in ("encoder", "decoder")):
        raise UserError(f"{place.where()}: its encoder is {list(shapes['encoder.weight'])}: it is {_CROSSCODER}")
