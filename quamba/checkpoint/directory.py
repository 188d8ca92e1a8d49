"""Replacing a directory as a whole: written beside, then exchanged, so that readers see the old one or the new one."""

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quamba.errors import CheckpointError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def replacing(directory: Path, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a new directory that takes the place of `directory` when the block ends without an error.

    Whatever happens before that leaves the old directory as it was. Its files that are not ours are carried over.
    Files written in the block are to be synced there.

    Args:
        directory: may exist; its parents are made.
        is_ours: True for the names, at the top of the directory, that belong to the block.

    Raises:
        CheckpointError: the path is not a directory, or one that cannot be exchanged.
    """
    directory = Path(os.path.realpath(directory))
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: found a file; expected a directory, or none yet")
    if Path(os.path.realpath(os.curdir)).is_relative_to(directory) or os.path.ismount(directory):
        raise CheckpointError(
            f"{directory}: found the working directory or a mount point, which cannot be replaced as a whole; "
            "save into a new directory inside it"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover(directory)
    _clean(directory)
    new = directory.parent / f"{_prefix(directory)}new-{secrets.token_hex(8)}"
    lock = None
    try:
        new.mkdir()
        # Where the file system has no locks, nobody can take one to clean up either.
        with suppress(OSError):
            lock = _lock(new)
        if directory.exists():
            new.chmod(stat.S_IMODE(directory.stat().st_mode))
            shutil.copytree(
                directory,
                new,
                symlinks=True,
                copy_function=_link,
                ignore=lambda path, names: [n for n in names if is_ours(n)] if Path(path) == directory else [],
                dirs_exist_ok=True,
            )
        yield new
        _sync(new)
        _put(new, directory)
        _sync(directory.parent)
        _carry_late(new, directory, is_ours)
    finally:
        # The new directory after a failure; the old one after the exchange or the renames.
        shutil.rmtree(new, ignore_errors=True)
        if directory.exists():
            shutil.rmtree(_old(directory), ignore_errors=True)
        if lock is not None:
            os.close(lock)


def recover(directory: Path) -> None:
    """Put the old directory back where a process died between the two renames of a system without exchange."""
    directory = Path(os.path.realpath(directory))
    old = _old(directory)
    if old.exists() and not directory.exists():
        os.rename(old, directory)


def _prefix(directory: Path) -> str:
    return f".{directory.name}.quamba-"


def _old(directory: Path) -> Path:
    return directory.parent / f"{_prefix(directory)}old"


def _put(new: Path, directory: Path) -> None:
    """Make `new` the directory; where there was one, it is at `new` afterwards."""
    if not directory.exists():
        os.rename(new, directory)
    elif not _exchange(new, directory):
        old = _old(directory)
        os.rename(directory, old)
        try:
            os.rename(new, directory)
        except BaseException:
            os.rename(old, directory)
            raise
        os.rename(old, new)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories atomically; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _carry_late(old: Path, directory: Path, is_ours: Callable[[str], bool]) -> None:
    """Move over what somebody put into the old directory while the new one was being written."""
    if old.exists():
        for entry in old.iterdir():
            if not is_ours(entry.name) and not os.path.lexists(directory / entry.name):
                os.rename(entry, directory / entry.name)


def _link(source: str, target: str) -> None:
    """A hard link, or a copy on file systems without."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        _sync(Path(target))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    """Hold a directory's lock until the descriptor is closed, by us or by the death of the process."""
    # Not on every system that can import the package.
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _clean(directory: Path) -> None:
    """Remove what died processes left beside the directory; what a living one holds locked stays."""
    for left in directory.parent.iterdir():
        if not left.name.startswith(_prefix(directory)):
            continue
        try:
            lock = _lock(left)
        except OSError:
            continue
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)
