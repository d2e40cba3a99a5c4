"""Temporary folders, locks, and publishing by rename: a folder appears whole or not at all, whenever its writer dies.

A writer holds a lock (flock) on its temporary folder, which the kernel releases when the writer dies. So a temporary
folder that can be locked belongs to nobody. Locks may not reach other machines, so their folders, recognised by the
host in the name, stay until they are a day old.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import StoreError

PREFIX = ".tmp-"
FOREIGN_STALE_SECONDS = 24 * 3600
_HOST = re.sub(r"[^A-Za-z0-9.]", "_", platform.node())[:64] or "host"


@contextmanager
def temporary_folder(root: Path) -> Iterator[Path]:
    """Yield a new folder under `root` that no `sweep` removes meanwhile; it is removed at the end, unless renamed."""
    with ExitStack() as locks:
        while True:
            path = _new_path(root)
            path.mkdir()
            try:
                descriptor = _lock(path, wait=True)
            except OSError:  # a file system without locks, where `sweep` goes by age
                break
            if descriptor is not None:  # else a sweep came between creation and lock
                locks.callback(os.close, descriptor)
                break
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove temporary folders under `root` whose writer is dead."""
    for path in _abandoned(root):
        shutil.rmtree(path, ignore_errors=True)


def leftovers(root: Path) -> list[Path]:
    """Return the temporary folders under `root` that `sweep` would remove."""
    return list(_abandoned(root))


def discard(path: Path) -> None:
    """Remove a folder, by a rename first: a kill leaves a temporary folder, never half of this one."""
    aside = _new_path(path.parent)
    path.rename(aside)
    sync(aside.parent)
    shutil.rmtree(aside, ignore_errors=True)


def shared_lock(path: Path) -> int | None:
    """Keep `exclusive_lock` off the folder `path` while the returned descriptor is open; None without locks.

    Raises:
        StoreError: another process has the exclusive lock.
    """
    try:
        descriptor = _lock(path, wait=False, shared=True)
    except OSError:
        return None
    if descriptor is None:
        raise StoreError(f"{path}: somebody removes or merges its segments; wait for its end and run again")
    return descriptor


@contextmanager
def exclusive_lock(path: Path) -> Iterator[bool]:
    """Lock the folder `path` for this process; yield False where another process has locked it, shared or exclusive.

    Yields True where the file system has no locks. Locks may not reach other machines.
    """
    try:
        descriptor = _lock(path, wait=False)
    except OSError:
        yield True
        return
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def publish(temporary: Path, final: Path, is_whole: Callable[[Path], bool]) -> None:
    """Rename the folder `temporary` to `final`, once all of it is on disk; keep a `final` that is whole already.

    A `final` that is there without being whole, as a broken copy leaves it, is replaced.
    """
    sync_tree(temporary)
    if move_into_place(temporary, final, is_whole):
        sync(final.parent)


def move_into_place(temporary: Path, final: Path, is_whole: Callable[[Path], bool]) -> bool:
    """Do as `publish` without waiting for the disk; return whether `final` is what was `temporary`."""
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
    descriptor = _lock(leftover, wait=True)
    if descriptor is None:
        return
    try:
        if not is_whole(leftover):
            discard(leftover)
    finally:
        os.close(descriptor)


def _abandoned(root: Path) -> Iterator[Path]:
    """Yield temporary folders whose writer is dead, each locked while the caller has it."""
    for path in sorted(root.glob(f"{PREFIX}*")):
        is_ours = path.name.startswith(f"{PREFIX}{_HOST}-")
        if not is_ours and not _is_old(path):
            continue
        try:
            descriptor = _lock(path, wait=False)
        except OSError:
            if _is_old(path):
                yield path
            continue
        if descriptor is not None:
            try:
                yield path
            finally:
                os.close(descriptor)


def _lock(path: Path, *, wait: bool, shared: bool = False) -> int | None:
    """Return a descriptor that locks the folder `path`; None where another process has it, or it is gone.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _new_path(root: Path) -> Path:
    return root / f"{PREFIX}{_HOST}-{secrets.token_hex(8)}"


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > FOREIGN_STALE_SECONDS
    except OSError:
        return False
