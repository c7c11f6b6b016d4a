"""What is measured on a GPU, and how the time for it is bounded."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import one_line
from ..longconv import BACKENDS
from ..models.sgconvnext import SIZES

TIMED = tuple(name for name in BACKENDS if name != "reference")  # which is no contender


@dataclass(frozen=True)
class Stage:
    """The convolutions of one stage of a network."""

    size: str
    number: int
    channels: int
    side: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.size}'s stage {self.number}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return self.channels, self.side, self.side


@dataclass(frozen=True)
class Plan:
    """Networks, batches and repetitions.

    Args:
        device: "cuda"; "cpu" tries the plan out.
        sizes: of the networks, of registry.SIZES.
        modes: "inference", "training".
        img_size: side of the images in pixels.
        backends: of the long convolution.
        reparameterize: networks that infer have fixed taps.
        forward_batch, backward_batch: images at a time in inference and in training.
        check_batches: images at a time in the checks of correctness.
        copy_bytes, matmul_side: of the tensors that the device's rates are measured on.
        rounds, seconds: of `timing.interleave` for single layers.
        model_rounds, model_seconds: of `timing.interleave` for networks.
    """

    device: str = "cuda"
    sizes: tuple[str, ...] = ("tiny", "large")
    modes: tuple[str, ...] = ("inference", "training")
    img_size: int = 224
    backends: tuple[str, ...] = TIMED
    reparameterize: bool = False
    forward_batch: int = 256
    backward_batch: int = 128
    check_batches: tuple[int, ...] = (1, 7, 128)
    copy_bytes: int = 2**30
    matmul_side: int = 8192
    rounds: int = 3
    seconds: float = 0.2
    model_rounds: int = 5
    model_seconds: float = 1.0

    def stages(self) -> list[Stage]:
        """All stages of all sizes."""
        return [
            Stage(size, i + 1, channels, self.img_size // 2 ** (i + 2), blocks)
            for size in self.sizes
            for i, (channels, blocks) in enumerate(zip(SIZES[size]["dims"], SIZES[size]["depths"], strict=True))
        ]

    def batch(self, mode: str) -> int:
        """Images at a time."""
        return self.forward_batch if mode == "inference" else self.backward_batch


AGAIN_S = 1.0  # until the alarm rings again: raised in a finalizer an exception is lost


class DeadlineError(BaseException):
    """Time is up. No Exception: compilers catch those, and go on."""


def _stop(*_: Any) -> None:
    raise DeadlineError


class Deadline:
    """Runs one thing after another until time is up, and remembers what it did not get to or what failed."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._missed: list[str] = []
        self._failed: list[str] = []
        self._interrupted: list[bool] = []

    @property
    def left(self) -> float:
        """Seconds; none after Ctrl-C."""
        return 0.0 if self.interrupted else self._end - time.monotonic()

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C came, which ends this deadline and those that share its memory."""
        return bool(self._interrupted)

    def share(self, fraction: float) -> "Deadline":
        """An earlier deadline after a fraction of what is left, with the same memory."""
        own = Deadline(self.left * fraction)
        own._missed, own._failed, own._interrupted = self._missed, self._failed, self._interrupted
        return own

    def run(self, what: str, work: Callable[[], object]) -> None:
        """Do something, but no longer than until the deadline. Only the main thread can: it sets an alarm."""
        if self.left <= 0:
            self._missed.append(what)
            return
        before = signal.signal(signal.SIGALRM, _stop)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, self.left, AGAIN_S)
                work()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except DeadlineError:
            self._missed.append(what)
        except KeyboardInterrupt:
            self._missed.append(what)
            self._interrupted.append(True)
        except Exception as error:  # of a compiler, a driver, the memory: the rest is still worth its time
            self._failed.append(f"{what} failed: {one_line(error)}")
        finally:
            signal.signal(signal.SIGALRM, before)

    def notes(self) -> list[str]:
        """What was not reached, and what failed."""
        end = "Ctrl-C" if self.interrupted else "the deadline"
        missed = [f"Not reached before {end}: {'; '.join(self._missed)}."] if self._missed else []
        return [*missed, *self._failed]
