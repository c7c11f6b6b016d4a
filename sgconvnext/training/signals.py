"""SIGTERM, SIGINT and SIGHUP end a run with a checkpoint; a second signal ends the run at once."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # from a scheduler, Ctrl-C, a closed terminal
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
ECHO_S = 1.0  # within it a repeated signal is no second request: launchers pass on what has come already


class StopRequest:
    """Remembers the first of STOPPING while its block lasts; the run looks at it between updates.

    A signal may reach one process of several: ``received`` is what this one got, ``agreed`` what all have heard of.
    """

    def __init__(self) -> None:
        self.received = 0
        self.agreed = 0
        self._when = 0.0

    def __enter__(self) -> "StopRequest":
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in STOPPING if not (number == signal.SIGHUP and nohup)]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
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
        """The signal's name, as in ``SIGTERM``."""
        return signal.Signals(self.agreed).name

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports for a process ended by the signal."""
        return 128 + self.agreed


def follow_parent(number: signal.Signals) -> None:
    """Get that signal when the parent dies without a word. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def settle_worker(worker: int) -> None:
    """Give a loader worker a process group of its own, and let it end when the run's process ends.

    torchrun and Ctrl-C signal the whole group, but the run needs its workers until it has saved; and a worker that
    outlived a killed run would hold the lock on its folder for seconds.
    """
    os.setpgid(0, 0)
    follow_parent(signal.SIGKILL)
    for number in STOPPING:  # drops signals to the old group, which were blocked since the fork
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the loader ends a worker
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
