"""An SAE's files on the hub. Only the header of a file is downloaded until its weights are needed, so that an SAE of
many gigabytes is described, or refused, before it is downloaded.
"""

import io
import posixpath
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from olmoscope.errors import UserError, did_you_mean
from olmoscope.hub_errors import hub_exceptions, hub_reason, is_unreachable
from olmoscope.hub_reach import asking_hub
from olmoscope.model_errors import first_line
from olmoscope.sae.io.place import Here, Place
from olmoscope.sae.io.registered import Registered

BLOCK = 2**18
"""Bytes that one request asks for while only a header is read."""


class OnHub(Place):
    """A folder or file of a repository on the hub, at one commit."""

    def __init__(self, name: str, repo: str, revision: str | None, commit: str, files: Sequence[str], path: str,
                 registered: Registered | None = None) -> None:
        """
        Args:
            revision: what the user asked for; `commit` is what it is now.
            files: all files of the repository.
            path: of a file or folder in it; empty for the whole repository.

        Raises:
            UserError: the path does not exist.
        """
        self.repo, self.revision, self.commit, self.files = repo, revision, commit, files
        is_file = path in files
        super().__init__(name, posixpath.basename(path) if is_file else None, registered)
        self.folder = posixpath.dirname(path) if is_file else path
        if not is_file and not self.names:
            folders = {posixpath.dirname(file) for file in files} - {""}
            raise UserError(f"cannot get {path or 'the SAE'} from hub repository {repo}: it has no such file or folder"
                            f"{did_you_mean(path, sorted(folders | set(files)))}")

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
            with asking_hub():
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
            with asking_hub():
                opened = HfFileSystem().open(f"{self.repo}@{self.commit}/{self._in_repo(name)}", "rb",
                                             block_size=BLOCK, cache_type="blockcache")
        except hub_exceptions() as error:
            raise self._refused(error, name) from error
        return cast(BinaryIO, _Remote(opened, lambda error: self._refused(error, name)))

    def fetch(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            with asking_hub():
                # By the name of the revision, which the cache then knows offline; it may have moved since.
                path = Path(hf_hub_download(self.repo, self._in_repo(name), revision=self.revision))
                if self.commit not in path.parts:
                    path = Path(hf_hub_download(self.repo, self._in_repo(name), revision=self.commit))
            return path
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
        return _cannot_get(error, self.repo, self._in_repo(name), self.commit)


class _Remote(io.BufferedIOBase):
    """An open file on the hub, whose errors while it is read become `UserError`s."""

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
    """A folder or file of a repository; if the hub cannot be reached, the copy in its cache on this machine.

    Args:
        name: what the user called it.
        revision: a branch, tag or commit; None: the main branch.

    Raises:
        UserError: the hub refuses access or cannot be reached, or the path does not exist.
    """
    from huggingface_hub import HfApi

    try:
        with asking_hub():
            info = HfApi().model_info(repo, revision=revision)
    except hub_exceptions() as error:
        cached = _cached(repo, revision) if is_unreachable(error) else None
        if cached is None:
            raise _cannot_get(error, repo, path, revision) from error
        return OnHub(name, repo, revision, cached.name, Here(cached).names, path, registered)
    files = [file.rfilename for file in info.siblings or []]
    return OnHub(name, repo, revision, str(info.sha), files, path, registered)


def _cannot_get(error: BaseException, repo: str, path: str, revision: str | None) -> UserError:
    """The hub's error in one line."""
    reason = hub_reason(error, repo, revision=revision) or first_line(error)
    return UserError(f"cannot get {path or 'the SAE'} from hub repository {repo}: {reason}")


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder of a repository in the hub's cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None

