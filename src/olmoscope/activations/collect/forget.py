"""What must be made again in a store whose tokens grow: the last segment, which ended at the old number of tokens."""

from pathlib import Path

from olmoscope.activations.store.format import read_manifest, segment_checksum, write_manifest
from olmoscope.activations.store.identity import as_collected
from olmoscope.activations.store.inspect import segment_numbers
from olmoscope.activations.store.shares import manifest_locked
from olmoscope.errors import UserError
from olmoscope.files import try_lock
from olmoscope.recipe.store import Split, StoreRecipe
from olmoscope.tokens.pack import lacks_tokens
from olmoscope.tokens.segments import segment_name


def forget_tail(recipe: StoreRecipe, split: Split, store: Path) -> None:
    """If the recipe asks for more tokens than were packed, mark the store as unfinished and delete the activations of
    its last segment. This can be interrupted at any point; running the same command again then finishes it.

    Raises:
        UserError: another process is making that segment, or a manifest is damaged.
    """
    if not lacks_tokens(recipe, split, store):
        return
    last = max(segment_numbers(store / "tokens"))
    claim = try_lock(store / "tokens" / segment_name(last))
    if claim is None:
        raise UserError(f"another process is collecting in {store}, for a recipe that asks for fewer tokens; wait for "
                        "it or stop it first")
    with claim, manifest_locked(store):
        if (store / "manifest.json").exists():
            found = read_manifest(store)
            write_manifest(store, found.model_copy(update={
                "finished": False, "wanted": as_collected(recipe, store, found).wanted}))
        segment_checksum(store, last).unlink(missing_ok=True)
        for path in (*store.glob("statistics.*"), *(path for path in store.glob(f"*/{segment_name(last)}")
                                                    if path.parent.name != "tokens")):
            path.unlink(missing_ok=True)
