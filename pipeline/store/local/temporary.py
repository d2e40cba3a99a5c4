"""Temporary folders, locks, and publishing by rename: a folder appears whole or not at all, whenever its writer dies.

A writer holds a lock (flock) on its temporary folder, which the kernel releases when the writer dies. So a temporary
folder that can be locked belongs to nobody. Locks may not reach other machines, so their folders, recognised by the
host in the name, stay until they are a day old.
"""

import errno
import fcntl
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.errors import StoreError

PREFIX = ".tmp-"
FOREIGN_STALE_SECONDS = 24 * 3600
_HOST = re.sub(r"[^A-Za-z0-9.]", "_", platform.node())[:64] or "host"


@contextmanager
def temporary_folder(root: Path) -> Iterator[Path]:
    """Yield a new folder under `root` that no `sweep` removes meanwhile; it is removed at the end, unless renamed."""
    with ExitStack() as stack:
        while True:  # again where a sweep comes between creation and lock
            path = _new_path(root)
            path.mkdir()
            # Where the file system has no locks, `sweep` goes by age.
            if stack.enter_context(exclusive_lock(path, wait=True)):
                break
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


def sweep(root: Path, *, remove: bool = True) -> int:
    """Remove the temporary folders under `root` whose writer is dead, or only count them; return their number."""
    abandoned = 0
    for path in sorted(root.glob(f"{PREFIX}*")):
        is_old = _is_old(path)
        if is_old or path.name.startswith(f"{PREFIX}{_HOST}-"):
            with exclusive_lock(path, without_locks=is_old) as is_abandoned:
                abandoned += is_abandoned
                if is_abandoned and remove:
                    shutil.rmtree(path, ignore_errors=True)
    return abandoned


def discard(path: Path) -> None:
    """Remove a folder, by a rename first: a kill leaves a temporary folder, never half of this one."""
    aside = _new_path(path.parent)
    path.rename(aside)
    sync(aside.parent)
    shutil.rmtree(aside, ignore_errors=True)


def shared_lock(path: Path) -> ExitStack:
    """Lock the folder `path` against `exclusive_lock` until the returned stack is closed.

    Does nothing where the file system has no locks.

    Raises:
        StoreError: another process has the exclusive lock.
    """
    stack = ExitStack()
    with suppress(OSError):
        if not stack.enter_context(_lock(path, fcntl.LOCK_SH | fcntl.LOCK_NB)):
            raise StoreError(f"{path}: somebody removes or merges its segments; wait for its end and run again")
    return stack


@contextmanager
def exclusive_lock(path: Path, *, wait: bool = False, without_locks: bool = True) -> Iterator[bool]:
    """Lock the folder `path` for this process; yield False where another process has locked it, shared or exclusive.

    Yields `without_locks` where the file system has no locks. Locks may not reach other machines.
    """
    with ExitStack() as stack:
        try:
            is_locked = stack.enter_context(_lock(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)))
        except OSError:
            is_locked = without_locks
        yield is_locked


def move_into_place(temporary: Path, final: Path, is_whole: Callable[[Path], bool]) -> bool:
    """Rename the folder `temporary` to `final`, unless that is whole already; return whether it was renamed.

    A `final` that is there without being whole, as a broken copy leaves it, is replaced.
    """
    while not is_whole(final):
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _move_aside(final, is_whole)
        else:
            return True
    return False


def publish_file(temporary: Path, final: Path) -> None:
    """Rename the file `temporary` to `final`, once it is on disk, unless `final` exists."""
    sync(temporary)
    try:
        os.link(temporary, final)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not final.exists():
            temporary.replace(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Wait until a folder is on disk with all that is in it, the deepest first."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in sorted(files):
            sync(Path(folder, name))
        sync(Path(folder))


def _move_aside(leftover: Path, is_whole: Callable[[Path], bool]) -> None:
    """Move a broken folder out of the way. The lock keeps another writer from moving what was just put in its place."""
    with _lock(leftover, fcntl.LOCK_EX) as is_locked:
        if is_locked and not is_whole(leftover):
            discard(leftover)


@contextmanager
def _lock(path: Path, kind: int) -> Iterator[bool]:
    """Lock the folder `path`, as flock's `kind` says; yield False where another process has it, or it is gone.

    Raises:
        OSError: the file system has no locks.
    """
    with ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, kind)
            is_locked = os.path.samestat(os.fstat(descriptor), path.stat())
        except (BlockingIOError, FileNotFoundError):
            is_locked = False
        if not is_locked:
            stack.close()
        yield is_locked


def _new_path(root: Path) -> Path:
    return root / f"{PREFIX}{_HOST}-{secrets.token_hex(8)}"


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > FOREIGN_STALE_SECONDS
    except OSError:
        return False
