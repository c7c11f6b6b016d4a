"""What commands share: types of arguments, what is told on standard output and error, and how they end."""

import contextlib
import errno
import math
import os
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from typing import NoReturn

import torch.distributed as dist

from .errors import one_line
from .files import expand

INTERRUPTED = 128 + signal.SIGINT  # as a shell reports a process that Ctrl-C ended
NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of torchrun's environment


def fail(program: str, error: Exception, code: int = 2, alone: bool = False) -> NoReturn:
    """End this process with one line; once per machine where the others fail alike, always where it fails alone."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if alone or not _has_company() or os.environ["LOCAL_RANK"] == "0":
        complain(f"{program}: error: {one_line(error)}")
    sys.exit(code)


def _has_company() -> bool:
    """Whether other processes of this machine can tell for this one."""
    return all(name in os.environ for name in NEEDED) and os.environ["WORLD_SIZE"] != "1"


def complain(text: str) -> None:
    """Write to standard error, where there is one; if it is full, the exit code must do."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


def tell(program: str, text: str) -> None:
    """Write a result to standard output at once; where that fails, end with one line and exit code 1.

    The result may have taken hours: it goes to standard error instead, unless a reader such as ``head`` has left.
    """
    try:
        if sys.stdout is None:  # the shell's >&-, into which print would drop everything in silence
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        _discard()
        lost, whole = "", text.rstrip("\n")
        if error.errno != errno.EPIPE:
            lost = f"; it would have held: {whole}" if "\n" not in whole else "; it would have held what is above"
            if "\n" in whole:
                complain(whole)
        told = OSError(f"standard output cannot be written ({error.strerror or one_line(error)}){lost}")
        fail(program, told, code=1, alone=True)


def _discard() -> None:
    """Let Python's last flush at exit go nowhere, which would otherwise fail again, with a traceback."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the block with exit code 130 and no traceback, after what the block has to clean up."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends what is left of it at once
        sys.exit(INTERRUPTED)


# Types of command-line arguments; argparse turns their complaints into its one-line errors
WHOLE, LONGEST_S = 2**31 - 1, 10**6  # of torch's sizes; of a measurement that somebody waits for


def path(text: str) -> str:
    """A path in which ``~`` is the home folder."""
    try:
        return expand(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    """A whole number of at least 1, and no larger than torch takes."""
    if not text.isdecimal() or not 1 <= (number := int(text[:20])) <= WHOLE:
        raise ArgumentTypeError(f"{text!r} must be a whole number of at least 1 and at most {WHOLE}")
    return number


def seconds(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST_S:
        raise ArgumentTypeError(f"{text!r} must be a positive number of seconds, at most {LONGEST_S}")
    return value


def size(text: str) -> tuple[int, int]:
    """Height and width: ``224`` or ``256x192``."""
    height, _, width = text.partition("x")
    return count(height), count(width or height)


def shape(text: str) -> tuple[int, int, int]:
    """Channels, height and width: ``96x56x56``."""
    if text.count("x") != 2:
        raise ArgumentTypeError(f"{text!r} must be CxHxW, as in 96x56x56")
    channels, height, width = map(count, text.split("x"))
    return channels, height, width
