"""Files that can be trusted: a file that exists is complete.

Everything the project writes goes through here: a temporary folder `.NAME.PID.tmp` beside the file, sync, rename, sync
of the folder. A process killed at any moment leaves at most such a folder, which nothing reads. It is a folder because
libraries make temporary files of their own beside the file that they write (safetensors' is `.tmpXXXXXX`).
"""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from olmoscope.errors import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on exit, sync it and rename it to `path`.

    This is for libraries that open the file themselves. Nothing appears at `path` if the block raises. The file gets
    the mode that a new file has here (umask, default ACL), whatever mode the library gave it: safetensors makes its
    files 0600, which no other user could read.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    make_folder(path.parent)
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary = folder / "half-written"  # a name that no search for finished files matches
    try:
        remove(folder)
        folder.mkdir()
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(stat.S_IMODE(mode))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise _explain(error, path) from error
    except SafetensorError as error:  # safetensors gives the system's error as text: "… (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise _explain(OSError(int(number[1]), os.strerror(int(number[1]))), path) from error
    finally:
        remove(folder)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Like `atomic_path`, with the temporary file already open for writing bytes."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs to read, atomically; NaN is refused (it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that we wrote.

    Raises:
        UserError: it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged (not JSON: {error}); delete it and run the command again") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> IO[bytes] | None:
    """Lock a file for one process. Create it if it is absent; leave its content alone.

    Returns:
        The open file: closing it frees the lock, and the kernel frees it when the process ends, however it ends. None
        if another process holds the lock.

    Raises:
        UserError: the folder cannot be written, or the file system has no locks.
    """
    return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)


def wait_for_lock(path: Path) -> IO[bytes]:
    """Like `try_lock`, but wait until the lock is free."""
    file = _lock(path, fcntl.LOCK_EX)
    assert file is not None
    return file


def _lock(path: Path, how: int) -> IO[bytes] | None:
    make_folder(path.parent)
    try:
        file = path.open("ab")
    except OSError as error:
        raise _explain(error, path) from error
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise UserError(f"the file system of {path} has no file locks (flock), which keep processes from "
                            "disturbing each other; choose another --out") from error
        raise
    return file


@contextlib.contextmanager
def locked(folder: Path, doing: str, name: str = ".lock") -> Iterator[None]:
    """Hold a folder for one process; the kernel frees it when the process ends, however it ends.

    Args:
        doing: what the message says: `another process is DOING in FOLDER`.
        name: the name of the lock file.

    Raises:
        UserError: another process holds it.
    """
    lock = try_lock(folder / name)
    if lock is None:
        raise UserError(f"another process is {doing} in {folder}; wait for it or stop it first")
    with lock:
        yield


def is_locked(folder: Path, besides: str = "") -> bool:
    """Whether a live process holds a lock file (`.lock*`) in a folder. No lock is kept.

    Args:
        besides: a lock file to ignore.
    """
    for path in folder.glob(".lock*"):
        if path.name == besides:
            continue
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def clean_temporary(folder: Path, name: str = "*") -> None:
    """Delete what killed processes left half-written below a folder; hold the lock of those files when you call it.

    Args:
        name: the name of the files that were being written, with wildcards.
    """
    for parent, folders, files in os.walk(folder):
        for left in fnmatch.filter(folders + files, f".{name}.tmp"):
            remove(Path(parent) / left)
            if left in folders:
                folders.remove(left)


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder. Other processes may remove files meanwhile, which makes `Path.rglob` raise."""
    if not folder.is_dir():  # also false for a name that this locale cannot encode
        return
    for parent, _, files in os.walk(folder):
        yield from (Path(parent) / name for name in files)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing; do nothing if it exists.

    Raises:
        UserError: a file is in the way, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        refuse_file(folder)
        # No file: a dangling link, or a file system without new folders, such as /proc.
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another one") from error
    except OSError as error:
        raise _explain(error, folder) from error


def refuse_file(folder: Path) -> None:
    """Refuse a place for a folder where a file is.

    Raises:
        UserError: it, or something above it, is a file.
    """
    if (file := next((path for path in (folder, *folder.parents) if path.is_file()), None)) is not None:
        what = "not a folder" if file == folder else f"so there can be no folder {folder}"
        raise UserError(f"{file} is a file, {what}; choose another folder, or move the file away")


def nearest_folder(path: Path) -> Path:
    """A folder that may not exist yet, or the nearest one above it that does."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it; do nothing if there is none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _explain(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left on the disk while writing {path}; make room and run the same command "
                         "again: finished work is kept")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"cannot write {path}: {error.strerror}; choose another folder, or change its permissions")
    return error
