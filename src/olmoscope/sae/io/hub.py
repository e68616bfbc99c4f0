"""An SAE's files on the hub. Of a file that is only looked into, the few bytes of its header are asked for, so that an
SAE of many gigabytes is described, or refused, before it is downloaded.
"""

import difflib
import io
import posixpath
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from olmoscope.errors import UserError
from olmoscope.hub_errors import hub_exceptions, hub_reason, is_unreachable
from olmoscope.model_errors import first_line
from olmoscope.sae.io.place import Here, Place
from olmoscope.sae.io.registered import Registered

BLOCK = 2**18
"""Bytes of a file that are asked for at a time while only its header is wanted."""


class OnHub(Place):
    """A folder or file of a repository on the hub, at one commit."""

    def __init__(self, name: str, repo: str, commit: str, files: Sequence[str], path: str,
                 registered: Registered | None = None) -> None:
        """
        Args:
            files: all of the repository.
            path: in it; empty: the whole repository.

        Raises:
            UserError: there is nothing of this path.
        """
        self.repo, self.commit, self.files = repo, commit, files
        is_file = path in files
        super().__init__(name, posixpath.basename(path) if is_file else None, registered)
        self.folder = posixpath.dirname(path) if is_file else path
        if not is_file and not self.names:
            raise UserError(f"cannot have {path or 'the SAE'} of hub repository {repo}: it has no such file or folder"
                            f"{_near(path, files)}")

    @property
    def words(self) -> str:
        return posixpath.join(self.repo, self.folder, self.file or "")

    @cached_property
    def names(self) -> Sequence[str]:
        prefix = f"{self.folder}/" if self.folder else ""
        return sorted(file.removeprefix(prefix) for file in self.files if file.startswith(prefix))

    @cached_property
    def beside(self) -> Sequence[str]:
        return [name for name in self.names if "/" not in name]

    def has(self, name: str) -> bool:
        return self._in_repo(name) in self.files

    def size(self, name: str) -> int:
        from huggingface_hub import HfApi

        try:
            found = HfApi().get_paths_info(self.repo, [self._in_repo(name)], revision=self.commit)
        except hub_exceptions() as error:
            raise self._refused(error, name) from error
        return cast(int, getattr(found[0], "size", 0))

    def open(self, name: str) -> BinaryIO:
        from huggingface_hub import HfFileSystem, try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, self._in_repo(name), revision=self.commit)
        if isinstance(cached, str):
            return Path(cached).open("rb")
        try:
            opened = HfFileSystem().open(f"{self.repo}@{self.commit}/{self._in_repo(name)}", "rb", block_size=BLOCK,
                                         cache_type="blockcache")
        except hub_exceptions() as error:
            raise self._refused(error, name) from error
        return cast(BinaryIO, _Remote(opened, lambda error: self._refused(error, name)))

    def fetch(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.repo, self._in_repo(name), revision=self.commit))
        except hub_exceptions() as error:
            raise self._refused(error, name) from error

    def at_name(self, name: str) -> str:
        repo = self.repo if self.registered else self.name.partition(":")[0]
        return f"{repo}:{self._in_repo(name)}"

    def where(self, name: str | None = None) -> str:
        return self.name if name in (None, self.file) else self.at_name(str(name))

    def _in_repo(self, name: str) -> str:
        return posixpath.normpath(posixpath.join(self.folder, name))

    def _refused(self, error: BaseException, name: str) -> UserError:
        return cannot_have(error, self.repo, self._in_repo(name), self.commit)


class _Remote(io.BufferedIOBase):
    """A file on the hub that is open: what goes wrong while it is read is said as of any other."""

    def __init__(self, opened: Any, refused: Callable[[BaseException], UserError]) -> None:
        self._opened, self._refused = opened, refused

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return cast(int, self._opened.seek(offset, whence))

    def tell(self) -> int:
        return cast(int, self._opened.tell())

    def read(self, size: int | None = -1) -> bytes:
        try:
            return cast(bytes, self._opened.read(-1 if size is None else size))
        except hub_exceptions() as error:
            raise self._refused(error) from error

    def close(self) -> None:
        self._opened.close()
        super().close()


def on_hub(name: str, repo: str, revision: str | None, path: str, registered: Registered | None = None) -> OnHub:
    """A folder or file of a repository; where the hub cannot be asked, what its cache on this machine has of it.

    Args:
        name: what the user called it.
        revision: a branch, tag or commit; None: the main branch.

    Raises:
        UserError: the hub does not give it, or has nothing of this path.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, revision=revision)
    except hub_exceptions() as error:
        cached = _cached(repo, revision) if is_unreachable(error) else None
        if cached is None:
            raise cannot_have(error, repo, path, revision) from error
        return OnHub(name, repo, cached.name, Here(cached).names, path, registered)
    return OnHub(name, repo, str(info.sha), [file.rfilename for file in info.siblings or []], path, registered)


def cannot_have(error: BaseException, repo: str, path: str, revision: str | None) -> UserError:
    """What to tell the user of a hub that does not give something."""
    reason = hub_reason(error, repo, revision=revision) or first_line(error)
    return UserError(f"cannot have {path or 'the SAE'} of hub repository {repo}: {reason}")


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder of a repository in the hub's cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None


def _near(path: str, files: Sequence[str]) -> str:
    """What there is of a similar name."""
    folders = {posixpath.dirname(file) for file in files} - {""}
    found = difflib.get_close_matches(path, sorted(folders | set(files)), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""
