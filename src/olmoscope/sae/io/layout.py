"""The tensors of a format: their names in its files, our names, and their shapes.

A layout maps names in a file to (our name, dimensions), e.g. `{"encoder.weight": ("W_enc", "FD")}`. Each dimension is a
letter: D width read, O width written (D in an SAE), F latents, L layers written. A letter has the same size in all
tensors. Our names are the matrices `W_enc`, `W_dec`, `W_skip` (`W` is both encoder and decoder of a tied SAE), `b_enc`,
`b_dec`, `threshold`, `b_gate`, `b_mag` and `r_mag`.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.sae.io.headers import not_finite, read_tensors
from olmoscope.sae.io.place import Place

Layout = Mapping[str, tuple[str, str]]

_FIRST = {"W_enc": "F", "W_dec": "F", "W": "F", "W_skip": "OD"}
"""The first dimension of each matrix here."""


def sizes(place: Place, file: str, layout: Layout, kind: str, *, optional: Collection[str] = (),
          ignored: Collection[str] = ()) -> dict[str, int]:
    """The size of each dimension, from a file's header.

    Args:
        kind: the format's name, for messages.
        optional: tensors that may be missing.
        ignored: tensors that do not change what the SAE computes.

    Raises:
        UserError: a tensor is missing, unknown, or of a shape that contradicts the others.
    """
    shapes, found = place.header(file).shapes, dict[str, int]()
    where = place.where(file)
    if missing := [name for name in layout if name not in shapes and name not in optional]:
        raise UserError(f"{where} has no {missing[0]}; {kind} has {', '.join(layout)}, this file "
                        f"{', '.join(sorted(shapes)) or 'nothing'}: download it again, or use the tool that wrote it")
    if unknown := sorted(set(shapes) - set(layout) - set(ignored)):
        raise UserError(f"{where} holds {unknown[0]}, which {kind} does not have: without it the SAE might compute "
                        "something else; use the tool that wrote it")
    for name, (_, dimensions) in sorted(layout.items(), key=lambda item: -len(item[1][1])):
        if name not in shapes:
            continue
        if len(shapes[name]) != len(dimensions):
            raise UserError(f"{where}: {name} is {list(shapes[name])}; it must have {len(dimensions)} dimensions: use "
                            "the tool that wrote it")
        for letter, size in zip(dimensions, shapes[name], strict=True):
            if found.setdefault(letter, size) != size:
                first = next(other for other, (_, letters) in layout.items() if letter in letters and other in shapes
                             and other != name and shapes[other][letters.index(letter)] == found[letter])
                raise UserError(f"{where}: {name} is {list(shapes[name])}, and {first} is {list(shapes[first])}: they "
                                "do not fit together; download the file again, or use the tool that wrote it")
    return found


def holds(place: Place, file: str | None, *names: str) -> bool:
    """Whether a file holds tensors with all these names."""
    return file is not None and set(names) <= set(place.header(file).shapes)


def load(place: Place, file: str, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a layout by our names, float32, one latent a row; missing ones are left out.

    Raises:
        UserError: damaged, or NaN or inf in a tensor.
    """
    there, found = read_tensors(place.fetch(file)), dict[str, Tensor]()
    for name, (ours, dimensions) in layout.items():
        if name not in there:
            continue
        tensor = there[name].float()
        if not torch.isfinite(tensor).all():
            raise UserError(not_finite(place.where(file), name))
        turned = len(dimensions) == 2 and not _FIRST[ours].startswith(dimensions[0])
        found[ours] = (tensor.T if turned else tensor).contiguous()
    return found
