"""Shell patterns of parameter names, as optim.lr_scale and optim.no_weight_decay take them."""

import difflib
from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn

FACTORS = "1e-06 to 1e+06"


def patterns(text: str) -> list[str]:
    """``"*.bias, head.*"`` to its patterns."""
    return [part.strip() for part in text.split(",") if part.strip()]


def factors(text: str) -> dict[str, float]:
    """``"*.sgconv.weight=10, head.*=2"`` to the factor of each pattern.

    Raises:
        ValueError: a part is no PATTERN=FACTOR, or a factor is not within FACTORS.
    """
    found: dict[str, float] = {}
    for part in patterns(text):
        pattern, _, factor = part.rpartition("=")
        found.setdefault(pattern.strip(), float(factor))
    if "" in found or not all(1e-6 <= factor <= 1e6 for factor in found.values()):
        raise ValueError(f"{text!r} must be PATTERN=FACTOR, with factors of {FACTORS}")
    return found


def are_factors(text: str) -> bool:
    """Whether `factors` can read it."""
    try:
        factors(text)
    except ValueError:
        return False
    return True


def first_match(name: str, among: Collection[str]) -> str | None:
    """The first pattern that matches the name; case counts."""
    return next((pattern for pattern in among if fnmatchcase(name, pattern)), None)


def refuse_unmatched(model: nn.Module, place: str, among: Collection[str]) -> None:
    """Refuse a pattern that matches no parameter of the model.

    Raises:
        ValueError: naming the place, the pattern, and names like it.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in among:
        if not any(first_match(name, [pattern]) for name in names):
            close = difflib.get_close_matches(pattern, names, n=2, cutoff=0.3) or names[:2]
            raise ValueError(
                f"{place}: {pattern!r} matches no parameter of the model; their names are like {', '.join(close)}"
            )
