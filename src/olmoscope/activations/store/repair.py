"""Delete what is damaged in a store and can be made again, so that `olmoscope collect` makes it again."""

from pathlib import Path

from olmoscope.activations.store.inspect import find_stores
from olmoscope.activations.store.shares import TOKENS_LOCK
from olmoscope.activations.store.verify import Verified, verify, with_disagreements
from olmoscope.errors import UserError
from olmoscope.files import is_locked, locked, remove, sync_folder


def repair_stores(path: Path, *, dry_run: bool) -> list[Verified]:
    """Verify the stores at a path and delete what damage makes useless; what `collect` cannot make is not touched.

    This deletes damaged segments (all files of a segment, since they are rewritten together), a damaged manifest or
    index, half-written files and, if tokens are damaged, all token segments from there on and their index: they are
    packed again from the text, to the same bytes, and sound activations are kept.

    Args:
        dry_run: only report what would be deleted.

    Raises:
        UserError: there is no store, or a process is writing it.
    """
    return with_disagreements([_repair(store, dry_run) for store in find_stores(path)])


def _repair(store: Path, dry_run: bool) -> Verified:
    # A collecting process holds a share throughout, and waits for the token lock before anything else.
    with locked(store, "writing", TOKENS_LOCK):
        if is_locked(store, besides=TOKENS_LOCK):
            raise UserError(f"another process is writing in {store}; wait for it or stop it first")
        found = verify(store, live=False)
        if not dry_run:
            for path in found.delete:
                remove(path)
                sync_folder(path.parent)
    return found
