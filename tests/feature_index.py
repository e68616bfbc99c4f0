"""A real index of a small SAE over real rows, made once per session and copied for each test that needs one."""

import shutil
from pathlib import Path

from helpers import recipe, write_documents
from olmoscope.features.rows_of import index_sae
from olmoscope.pipeline import collect_stores, evaluate_saes, train_saes
from olmoscope.recipe.schema import Recipe

_made: dict[int, Path] = {}


def small_out(folder: Path, **changes: object) -> tuple[Recipe, Path]:
    """An output folder with stores and two trained, evaluated SAEs of 512 latents, layers 1 and 7."""
    made = recipe(write_documents(folder / "corpus").parent, **changes)
    out = folder / "out"
    collect_stores(made, out)
    assert all(fresh for _, fresh in train_saes(made, out, []))
    assert all(fresh for _, fresh in evaluate_saes(made, out, []))
    return made, out


def small_index(folder: Path, sae: int = 0) -> Path:
    """The index of one of these SAEs, in `folder / "out" / "runs" / ... / "index"` with all that it was made from."""
    if sae not in _made:
        import tempfile

        made, out = small_out(Path(tempfile.mkdtemp()))
        _made[sae] = out
        index_sae(str(out / "runs" / made.saes[sae].id), device="cpu")
    shutil.copytree(_made[sae], folder / "out")
    return next((folder / "out").rglob("index/manifest.json")).parent
