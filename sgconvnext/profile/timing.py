"""Timing things against each other: in turns, so that a machine that slows down slows all of them."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Step = Callable[[], object]

RATIO = (  # what every table says of its ratios
    "The two run in alternating turns. The ratio is the median over all pairs of neighbouring turns. So it can differ "
    "from the quotient of the numbers beside it. Above 1 is faster."
)
TURN_S = 0.1  # shorter turns would time the waiting for a GPU, longer ones let the machine change between two


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, by round and turn, beside those of the first thing timed in the same turns."""

    rounds: list[list[float]]
    first: list[list[float]]

    @property
    def by_round(self) -> list[float]:
        """Seconds of a step, the median over each round's turns."""
        return [statistics.median(turns) for turns in self.rounds]

    @property
    def median(self) -> float:
        """Seconds of a step, over the rounds."""
        return statistics.median(self.by_round)

    @property
    def spread(self) -> float:
        """(slowest - fastest round) / median."""
        return (max(self.by_round) - min(self.by_round)) / self.median

    @property
    def ratio(self) -> float:
        """How many times as fast as the first: the median over all pairs of turns, not the quotient of the medians."""
        first, own = map(itertools.chain.from_iterable, (self.first, self.rounds))
        return statistics.median(a / b for a, b in zip(first, own, strict=True))


def rounds_of(steps: Sequence[Step], device: torch.device, seconds: float) -> Iterator[list[list[float]]]:
    """Time steps in turns A B A B ... after a warm-up, without end: round by round, seconds by step and turn.

    A turn of each lasts as long as one step of the slowest, or TURN_S; a round has as many turns as fill ``seconds``.

    Args:
        steps: what to time; at least one.
        device: waited for before and after every turn.
        seconds: of every step in a round.
    """
    once = [_warm_up(step, device) for step in steps]
    turn = max(TURN_S, *once)
    repeats = [max(1, round(turn / step_s)) for step_s in once]
    turns = max(1, round(seconds / turn))
    while True:
        times: list[list[float]] = [[] for _ in steps]
        for _ in range(turns):
            for step, repeat, own in zip(steps, repeats, times, strict=True):
                own.append(_turn(step, device, repeat))
        yield times


def _warm_up(step: Step, device: torch.device) -> float:
    """Seconds of the third step. The first two compile, choose algorithms and allocate, so they say nothing."""
    _turn(step, device, 2)
    return _turn(step, device, 1)


def _turn(step: Step, device: torch.device, repeat: int) -> float:
    """Seconds per step."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    _wait(device)
    return (time.perf_counter() - start) / repeat


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
