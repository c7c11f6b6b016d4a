"""How long a command measures, and what it keeps when it is stopped."""

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch

from ..errors import is_out_of_memory, one_line
from .timing import Step, Timing, rounds_of

_logger = logging.getLogger(__name__)


class DoesNotFitError(ValueError):
    """The memory is too small for a model and its work."""


class Session:
    """The measurements of one command. When the time is up or Ctrl-C comes, it ends, and keeps what it has.

    Args:
        rounds: of each measurement.
        round_seconds: of each thing in a round.
        seconds: after which nothing new is begun. What is being measured finishes its round.
    """

    def __init__(self, rounds: int, round_seconds: float, seconds: float = math.inf) -> None:
        self.rounds, self.round_seconds = rounds, round_seconds
        self.interrupted = False  # by Ctrl-C
        self.failed = False  # something is wrong, and not only too large
        self.problems: list[str] = []
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._missed: list[str] = []

    @property
    def over(self) -> bool:
        """Whether the time is up, or Ctrl-C came."""
        return self.interrupted or time.monotonic() >= self._end

    def attempt(self, what: str, measure: Callable[[], object], begun: bool = False) -> None:
        """Measure something, unless the session is over. An error is noted, and the next thing can be measured.

        Args:
            what: its name in notes.
            measure: does it.
            begun: it has been prepared at length, so it is not left out when the time is up.
        """
        if self.over and not (begun and not self.interrupted):
            self._missed.append(what)
            return
        try:
            measure()
        except KeyboardInterrupt:
            self.interrupted = True
            self._missed.append(what)
        except Exception as error:  # of a compiler, a driver, the memory: the rows so far are worth more
            if isinstance(error, DoesNotFitError) or is_out_of_memory(error):
                self.problems.append(f"{what}: out of memory; not timed.")
                return
            if not isinstance(error, ValueError):
                _logger.exception("%s", what)
            told = one_line(error)
            self.fail(told if told.startswith(what) else f"{what} failed: {told}")

    def fail(self, problem: str) -> None:
        """Note what is wrong. The command then ends with exit code 1."""
        self.failed = True
        self.problems.append(problem)

    def time(self, what: str, steps: Sequence[Step], device: torch.device) -> list[Timing]:
        """Time steps in turns, round by round. A session that ends meanwhile keeps the rounds that are complete."""
        if self.interrupted:  # while something was prepared
            raise KeyboardInterrupt
        rounds: list[list[list[float]]] = []
        try:
            for measured in rounds_of(steps, device, self.round_seconds):
                rounds.append(measured)
                if len(rounds) == self.rounds or self.over:
                    break
        except KeyboardInterrupt:
            if not rounds:
                raise
            self.interrupted = True
        if len(rounds) < self.rounds:
            self._missed.append(f"{self.rounds - len(rounds)} of {self.rounds} rounds of {what}")
        by_step = [list(own) for own in zip(*rounds, strict=True)]
        return [Timing(own, by_step[0]) for own in by_step]

    def notes(self) -> list[str]:
        """What failed, and what was not reached."""
        end = "Ctrl-C" if self.interrupted else f"the {self._seconds:g} seconds of --seconds were over"
        return [*self.problems, *([f"Not measured before {end}: {'; '.join(self._missed)}."] if self._missed else [])]
