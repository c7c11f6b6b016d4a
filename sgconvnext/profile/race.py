"""Time candidates that are right against each other, and choose: what `tune` does for convolutions and for blocks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import is_out_of_memory, one_line
from ..tuning import TIE
from .timing import Step, rounds_of

ROUNDS, ROUND_S = 5, 0.1  # of each candidate
SLOW = 2.0  # times the fastest: a candidate that takes so long once is not timed again


class Candidate(NamedTuple):
    """One way to compute something.

    Args:
        errors: computes by part how far it is from the truth, relative.
        step: makes what is timed.
    """

    errors: Callable[[], dict[str, float]]
    step: Callable[[], Step]


def run(
    candidates: dict[str, Candidate], tolerance: float, shipped: str, device: torch.device, none_is_right: str
) -> dict[str, Any]:
    """Check the candidates, time those whose errors are all within the tolerance, and choose.

    Returns:
        backend, shipped, seconds, errors and left_out of `tuning.Measured`.

    Raises:
        ValueError: ``none_is_right``, with the reasons.
    """
    checked = {name: _check(candidate, tolerance) for name, candidate in candidates.items()}
    steps = {name: step for name, (_, step) in checked.items() if not isinstance(step, str)}
    left_out = {name: why for name, (_, why) in checked.items() if isinstance(why, str)}
    if not steps:
        raise ValueError(f"{none_is_right}: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}")
    seconds, slow = times(steps, shipped, device)
    return {
        "backend": fastest(seconds, shipped),
        "shipped": shipped,
        "seconds": seconds,
        "errors": {name: errors for name, (errors, _) in checked.items() if errors},
        "left_out": left_out | slow,
    }


def _check(candidate: Candidate, tolerance: float) -> tuple[dict[str, float], Step | str]:
    """The errors of a candidate, and what is timed of it or why nothing is."""
    errors: dict[str, float] = {}
    try:
        errors = candidate.errors()
        if all(error <= tolerance for error in errors.values()):  # which NaN is not
            return errors, candidate.step()
    except Exception as error:  # of a compiler, a driver, the memory: the others may work
        return errors, "out of memory" if is_out_of_memory(error) else f"fails: {one_line(error)[:200]}"
    return errors, "wrong, " + ", ".join(f"{part} {error:.1e}" for part, error in errors.items())


def step(forward: Callable[[], Tensor], inputs: Sequence[Tensor], dy: Tensor) -> Step:
    """Forward; with inputs, forward and their gradients."""

    def infer() -> None:
        with torch.no_grad():
            forward()

    def train() -> None:
        with torch.enable_grad():
            y = forward()
            torch.autograd.grad(y, inputs, dy.to(y.dtype))

    return train if inputs else infer


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
