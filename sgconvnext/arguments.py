"""Types of command-line arguments; argparse turns their complaints into its one-line errors."""

import math
from argparse import ArgumentTypeError


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text!r} must be a positive number of seconds")
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
