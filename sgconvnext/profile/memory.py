"""The memory that a step takes at its peak, measured in a process of its own."""

import contextlib
import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ..errors import is_out_of_memory, one_line
from .session import DoesNotFitError
from .timing import Step


def peak(what: str, device: str, prepare: Callable[[], Step]) -> int:
    """Bytes that what a step needs and two steps take at their peak, measured in a process of their own.

    On CUDA the allocator's peak; on a CPU the peak of the resident set beyond the interpreter and its libraries.

    Args:
        what: the step's name in messages.
        device: "cpu" or "cuda".
        prepare: makes the step there; a function that can be pickled.

    Raises:
        DoesNotFitError: the process ran out of memory, or was killed.
        ValueError: the step fails.
    """
    torch.cuda.empty_cache()  # what this process keeps for later, that one may need
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            with _deaf():
                measured = pool.submit(_peak_here, device, prepare, torch.get_num_threads())
            return measured.result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()  # the pool would wait for it
            raise
        except BrokenProcessPool as error:
            raise DoesNotFitError(f"{what}: its process was killed, probably for its memory") from error
        except (RuntimeError, AssertionError, TypeError) as error:
            raise failure(what, error) from error


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """A process started here does not hear Ctrl-C: it would print a traceback of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def failure(what: str, error: Exception) -> ValueError:
    """What an error of torch's means for the user."""
    if is_out_of_memory(error):
        return DoesNotFitError(f"{what}: out of memory")
    return ValueError(f"{what}: {one_line(error)}")


def _peak_here(device: str, prepare: Callable[[], Step], threads: int) -> int:
    torch.set_num_threads(threads)
    layer = nn.Linear(1, 1)
    create_optimizer_v2(layer, opt="adamw", lr=1e-3, weight_decay=0.05).step()  # imports half of torch
    with contextlib.suppress(OSError):  # on Linux this sets back the peak, which the imports raised
        Path("/proc/self/clear_refs").write_text("5")
    before, _ = _resident()
    step = prepare()
    step()
    step()  # the first one makes the optimiser's state
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident()[1] - before


def _resident() -> tuple[int, int]:
    """Bytes of this process in memory, now and at most so far; where only the most is known, that twice."""
    status = Path("/proc/self/status")
    if status.exists():
        # not getrusage: on Linux that starts from the memory of the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, most = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        return now, most
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most
