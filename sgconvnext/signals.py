"""SIGTERM and SIGINT end a run with a checkpoint, a second one ends it at once."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
ECHO_S = 1.0  # launchers may pass on a signal that has reached the process already: not yet a second request


class StopRequest:
    """Remembers the first SIGTERM or SIGINT while its block lasts; the run looks at it between updates.

    A signal may reach one process of several: ``received`` is what this one got, ``agreed`` what all have heard of.
    """

    def __init__(self) -> None:
        self.received = 0
        self.agreed = 0
        self._when = 0.0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._when > ECHO_S:
            for worker in multiprocessing.active_children():
                worker.kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self.received, self._when = number, time.monotonic()

    @property
    def name(self) -> str:
        """As in SIGTERM."""
        return signal.Signals(self.agreed or self.received).name

    @property
    def exit_code(self) -> int:
        """As a shell reports a process that the signal ended."""
        return 128 + self.agreed


def follow_parent() -> None:
    """Be asked to stop (SIGTERM) when torchrun dies without a word, so that no process of a run trains on alone."""
    if sys.platform == "linux":  # no other system has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_process_group(worker: int) -> None:
    """For loader workers: torchrun and Ctrl-C signal the whole group, but the run still needs its workers to save."""
    os.setpgid(0, 0)
