"""Types of command-line arguments; argparse turns their complaints into its one-line errors."""

import math
from argparse import ArgumentTypeError

from .paths import expand

WHOLE, LONGEST_S = 2**31 - 1, 10**6  # of torch's sizes; of a measurement that somebody waits for


def path(text: str) -> str:
    """A path in which ``~`` is the home folder."""
    try:
        return expand(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    """A whole number of at least 1, and no larger than torch takes."""
    if not text.isdecimal() or not 1 <= (number := int(text[:20])) <= WHOLE:
        raise ArgumentTypeError(f"{text!r} must be a whole number of at least 1 and at most {WHOLE}")
    return number


def seconds(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST_S:
        raise ArgumentTypeError(f"{text!r} must be a positive number of seconds, at most {LONGEST_S}")
    return value


def size(text: str) -> tuple[int, int]:
    """Height and width: ``224`` or ``256x192``."""
    height, _, width = text.partition("x")
    return count(height), count(width or height)


def shape(text: str) -> tuple[int, int, int]:
    """Channels, height and width: ``96x56x56``."""
    if text.count("x") != 2:
        raise ArgumentTypeError(f"{text!r} must be CxHxW, as in 96x56x56")
    channels, height, width = map(count, text.split("x"))
    return channels, height, width
