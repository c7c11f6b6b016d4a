"""How a knob is declared: beside its default stand its reason, its limits, and whether a resume may change it."""

from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal, NamedTuple


class Limits(NamedTuple):
    """What a knob must be. null is always allowed where the knob's type has it.

    Upper limits exclude what nobody can mean, and what would hang or fail later without naming the knob.
    """

    hold: Callable[[Any], bool]
    spoken: str


def _each(holds: Callable[[Any], bool], spoken: str) -> Limits:
    """For a number, or for both numbers of a pair."""
    return Limits(lambda value: all(map(holds, value)) if isinstance(value, tuple) else holds(value), spoken)


def at_least(low: float, spoken: str = "") -> Limits:
    """``low`` included."""
    return _each(lambda value: value >= low, spoken or f"at least {low}")


def between(low: float, high: float) -> Limits:
    """Both ends included."""
    return _each(lambda value: low <= value <= high, f"between {low} and {high}")


POSITIVE = _each(lambda value: value > 0, "positive")
BELOW_1 = _each(lambda value: 0 <= value < 1, "at least 0 and below 1")
FACTOR = _each(lambda value: 0 < value <= 1, "above 0 and at most 1")
ANY = Limits(lambda value: True, "any")
SEE_PAIRS = ANY  # the limit is another knob, see `_check_pairs`

Resume = Literal["refused", "free", "local"]
Order = Literal["", "always", "shards"]


class Knob(NamedTuple):
    """What is known about a knob beside its name, type and default, see `knob`."""

    text: str
    limits: Limits | None
    resume: Resume
    order: Order
    path: bool


def knob(
    default: Any,
    text: str,
    limits: Limits | None = None,
    *,
    resume: Resume = "refused",
    order: Order = "",
    path: bool = False,
) -> Any:
    """A dataclass field for one knob.

    Args:
        default: its value where nothing sets it.
        text: its unit or reason, for --help.
        limits: what it must be; every number needs them.
        resume: "refused": the knob decides the numbers of a run, so a resumed run must have the same, unless
            allow_change names it. "free": it decides nothing about them, or only how the run began. "local": as
            "free", and the machines of a run may differ in it.
        order: "always": with the number of updates, the knob decides how far into an epoch the run is, so not even
            allow_change changes it in the middle of an epoch. "shards": the same, for datasets in shards alone.
        path: whether ``~`` is the home folder in it.
    """
    metadata = {"knob": Knob(text, limits, resume, order, path)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)
