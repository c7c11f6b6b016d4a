"""Files with their SHA-256 beside them, as the program sha256sum writes it: replaced, checked and copied."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ..files import flush, write_whole


class HashingFile:
    """A file to write into, with the SHA-256 of all that was to be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None  # torch.save turns it into a RuntimeError about a position

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def replace(path: Path, make: Callable[[Path], str]) -> None:
    """Replace a file and its checksum.

    Each is written under another name, flushed to the disk and renamed, the checksum first. Until the file follows,
    the checksum's second line is that of the old file, so that at every moment one of the lines is right.

    Args:
        path: of the file.
        make: makes the file of another name, and returns its SHA-256.

    Raises:
        OSError, RuntimeError: of ``make``, or of the disk; both files are as they were before.
    """
    partial, beside = path.with_name(path.name + ".partial"), checksum_of(path)
    before = beside.read_bytes() if path.exists() and beside.exists() else b""
    try:
        partial.unlink(missing_ok=True)  # it may be another name of a checkpoint, which must not be written into
        line = f"{make(partial)}  {path.name}\n".encode()
        write_whole(beside, line + before)
        partial.replace(path)
        partial.unlink(missing_ok=True)  # a rename does nothing if both names are of one file
    except (OSError, RuntimeError):
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
            if before:
                write_whole(beside, before)
            else:
                beside.unlink()
        raise
    # the file is saved; that the checksum keeps two lines, or a folder cannot sync, does no harm
    with contextlib.suppress(OSError):
        if before:
            write_whole(beside, line)
        _flush_folder(path.parent)


def checksum_of(path: Path) -> Path:
    """The file beside a checkpoint that holds its SHA-256."""
    return path.with_name(path.name + ".sha256")


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_damaged(path: Path) -> bool:
    """Whether a file is not what the checksum beside it says; False where there is no checksum."""
    return checksum_of(path).is_file() and _sha256(path) not in _stated(path)


def _sha256(path: Path) -> str:
    """Of a file's content."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()


def _stated(path: Path) -> list[str]:
    """The SHA-256 that the checksum beside a file states: two while the file is replaced, none without a checksum."""
    beside = checksum_of(path)
    lines = beside.read_text(errors="replace").splitlines() if beside.is_file() else []
    return [line.split(" ")[0] for line in lines]


def identity(path: Path) -> str:
    """The SHA-256 of a file: as stated, if that is clear, because reading gigabytes takes its time."""
    stated = _stated(path)
    return stated[0] if len(stated) == 1 else _sha256(path)


def copy(path: Path, to: Path) -> str:
    """The SHA-256 of what was copied, which must be what the original's checksum says.

    Raises:
        OSError: it is not, or the disk is full.
    """
    with path.open("rb") as original, to.open("wb") as file:
        hashing = HashingFile(file)
        shutil.copyfileobj(original, hashing, 2**20)
        flush(file)
    found = hashing.sha256.hexdigest()
    if found not in (_stated(path) or [found]):
        raise OSError(errno.EIO, f"{str(path)!r} is not what its checksum says, and is not copied")
    return found
