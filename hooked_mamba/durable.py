"""Files that after a crash are either old or new, never partly written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DiskFullError(OSError):
    """No room for a file; earlier files are untouched."""


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` as a whole: a temporary file is written, synced and renamed.

    Raises
    ------
    DiskFullError
        If the disk (or the quota) is full. The half-written file is removed.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with room_for(path, len(data)):
            write_through(aside, data)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    os.replace(aside, path)
    sync(path.parent)


@contextmanager
def room_for(path: Path, n_bytes: int) -> Iterator[None]:
    """Turn the system's error about a full disk, which may name no file, into one that names `path`.

    Raises
    ------
    DiskFullError
        If the disk (or the quota) is full.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskFullError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(
            error.errno,
            f"no room for {n_bytes:,} bytes of {path.name}: {error.strerror}. What was written before is intact;"
            " make room and run the same again",
            str(path),
        ) from None


def write_through(path: Path, data: bytes) -> None:
    """Write and sync."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Sync a file, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
