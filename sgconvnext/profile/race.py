"""Time candidates that are right against each other, and choose: what `tune` does for convolutions and for blocks."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..tuning import TIE
from .timing import Step, rounds_of

ROUNDS, ROUND_S = 5, 0.1  # of each candidate
SLOW = 2.0  # times the fastest: a candidate that takes so long once is not timed again


def times(steps: dict[str, Step], shipped: str, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds by name, in alternating turns; and, of those that are slow at their first turn, that they are.

    The fastest turn counts: what else the machine does only adds to it.
    """
    once = {name: min(next(rounds_of([step], device, ROUND_S))[0]) for name, step in steps.items()}
    limit = SLOW * min(once.values(), default=0.0)
    raced = [name for name in steps if once[name] <= limit or name == shipped]
    seconds = {name: once[name] for name in raced}
    if len(raced) > 1:
        rounds = rounds_of([steps[name] for name in raced], device, ROUND_S)
        by_name = zip(*(next(rounds) for _ in range(ROUNDS)), strict=True)
        seconds = {name: min(map(min, own)) for name, own in zip(raced, by_name, strict=True)}
    return seconds, {name: f"slow, {1000 * once[name]:.3g} ms" for name in steps if name not in seconds}


def fastest(seconds: dict[str, float], shipped: str) -> str:
    """The shipped choice, unless it was left out or another one is faster by more than a tie."""
    first = min(seconds, key=seconds.__getitem__, default=shipped)
    keep = shipped in seconds and seconds[shipped] <= TIE * seconds[first]
    return shipped if keep else first


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, which draws no random numbers and moves no running mean; then as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
