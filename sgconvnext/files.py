"""Paths with a home folder in them, and files that are whole or not there."""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


def expand(text: str) -> str:
    """The path with the home folder in place of ``~`` or ``~user`` at its start.

    Raises:
        ValueError: there is no such user, or no home folder; a folder called ``~`` is never made.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text[1:].partition("/")[0]
        why = f"there is no user {user!r}" if user else "the home folder is not known"
        raise ValueError(f"{text!r}: {why}; write the path in full, or './{text}' for a folder of that name")
    return expanded


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all: into one beside it, flushed to the disk, then renamed over it.

    Raises:
        OSError: naming the file, which is as it was before.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            flush(file)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}: {str(path)!r}") from error


def flush(file: BinaryIO) -> None:
    """Write what is in memory to the disk."""
    file.flush()
    os.fsync(file.fileno())
