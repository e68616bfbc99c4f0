"""What stops a collection: each reason gets one line that says what is wrong, where, and what to do."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.gather import SiteRows
from olmoscope.activations.store.identity import as_collected, is_of
from olmoscope.errors import UserError
from olmoscope.recipe.kept import differs_from_store
from olmoscope.recipe.store import StoreRecipe
from olmoscope.site import Site
from olmoscope.tokens.identity import refuse_fewer
from olmoscope.tokens.segments import TokenSegment
from olmoscope.units import format_bytes

TOKEN_BYTES = 13
"""Bytes of a token in tokens/: id, document, source. (Tokens that wait for later segments at most double this.)"""
ROW_BYTES = 13
"""Bytes of a token in rows/: id, sequence, position, source."""
NORM_BYTES = 4
"""Bytes of a token's norm at each site, in rows/."""
FLOAT16_MAX = torch.finfo(torch.float16).max


def refuse_another_store(store: Path, recipe: StoreRecipe) -> None:
    """Refuse a folder that holds another recipe's store, before anything heavy is loaded. The recipe may now ask for
    more sites and more tokens.

    Raises:
        UserError: the store belongs to another recipe, or has more tokens than the recipe asks for.
    """
    if (store / "manifest.json").exists():
        found = read_manifest(store)
        if not is_of(recipe, store, found):
            differing = differs_from_store(store, recipe, lambda kept: is_of(kept, store, found),
                                           lambda of: as_collected(of, store, found))
            what = differing or f" (model {found.model.name}, sites {', '.join(map(str, found.sites))})"
            raise UserError(f"{store} holds the store of another recipe{what}; choose another --out, or delete the "
                            "folder to collect again")
        refuse_fewer(store, found.split, as_collected(recipe, store, found), recipe)


def refuse_full_disk(store: Path, recipe: StoreRecipe, widths: Iterable[int], rows: int) -> None:
    """Refuse to begin if what is still to be written (activations, norms, and each row's token, sequence, position and
    source) does not fit on the disk. (The tokens are already written.)

    Args:
        widths: D of each site.
        rows: the number of rows still to be written.

    Raises:
        UserError: the disk lacks room.
    """
    needed = rows * (sum(recipe.activations.row_bytes(width) + NORM_BYTES for width in widths) + ROW_BYTES)
    free = shutil.disk_usage(store).free
    if needed > free:
        raise UserError(f"{store} needs {format_bytes(needed)} more, but the disk has {format_bytes(free)} free; make "
                        "room, choose another --out, or lower tokens.count")


def refuse_unsafe_float16(recipe: StoreRecipe, bounds: Mapping[Site, float]) -> None:
    """Refuse float16 if the bounds from the weights allow an overflow; without bounds, `refuse_overflow` decides later.

    Args:
        bounds: for each site with a known bound, the bound on max |x|.

    Raises:
        UserError: a bound exceeds the largest float16.
    """
    if recipe.activations.dtype == "float16":
        for site in recipe.activations.sites:
            if bounds.get(site, 0.0) > FLOAT16_MAX:
                raise UserError(f"activations.dtype: float16 holds at most {FLOAT16_MAX:.0f}, but the weights of "
                                f"{recipe.model.name} allow {bounds[site]:.0f} at {site}; use bfloat16")


def refuse_not_finite(site: Site, rows: SiteRows, tokens: TokenSegment, order_R: np.ndarray) -> None:
    """Refuse to store NaN or infinity.

    Args:
        rows: a filled segment of the site.
        order_R: for each row, its row in the token segment.

    Raises:
        UserError: a row is not finite.
    """
    if not rows.largest_D.isfinite().all():
        bad_R = order_R[(~rows.square_norm_R[: tokens.rows].isfinite()).cpu().numpy()]
        row = int(bad_R.min())
        sequence = int(np.searchsorted(tokens.sequence_starts, row, side="right")) - 1
        raise UserError(f"{site} gave NaN or infinite activations ({len(bad_R)} of {tokens.rows} rows; first: "
                        f"sequence {tokens.sequence_numbers[sequence]}, token "
                        f"{row - tokens.sequence_starts[sequence]}); try model.dtype=float32")


def refuse_overflow(site: Site, rows: SiteRows) -> None:
    """Refuse values that would become infinite in the store's dtype.

    Raises:
        UserError: there is such a value.
    """
    if "scale" not in rows.stored:
        dtype = rows.stored["activations"].dtype
        name = str(dtype).removeprefix("torch.")
        largest = float(rows.largest_D.max())
        if torch.tensor(largest).to(dtype).isinf():
            raise UserError(f"{site} has a value of {largest:.6g}, but {name} holds at most "
                            f"{torch.finfo(dtype).max:.6g}: use activations.dtype=bfloat16")
