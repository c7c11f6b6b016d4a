"""What a command says on standard output, and how it ends where it cannot say it or is told to stop."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator

from . import distributed
from .errors import one_line

INTERRUPTED = 128 + signal.SIGINT  # as a shell reports a process that Ctrl-C ended


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
                distributed.complain(whole)
        told = OSError(f"standard output cannot be written ({error.strerror or one_line(error)}){lost}")
        distributed.fail(program, told, code=1, alone=True)


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
