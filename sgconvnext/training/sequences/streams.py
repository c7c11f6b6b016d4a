"""Random numbers of one sample each, and the checks of arguments that all tasks share."""

from numbers import Integral
from typing import Any

import numpy as np

LARGEST = 2**31 - 1  # of seeds and numbers of samples


def stream(seed: int, train: bool, index: int) -> np.random.Generator:
    """The generator of one sample: it depends on nothing else, so that every process draws the same."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0 if train else 1, index)))


def check_whole(name: str, value: Any, least: int, most: int = LARGEST) -> None:
    """Refuse what is no whole number of that range.

    Raises:
        ValueError: naming the argument, its value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ValueError(f"{name}={value!r} must be a whole number of {least} to {most}")


def check_split(train: Any, samples: Any, seed: Any) -> None:
    """Refuse a split's name where True or False is meant, and numbers out of range.

    Raises:
        ValueError: naming the argument and its value.
    """
    if not isinstance(train, bool):
        raise ValueError(f"train={train!r} must be True, for the training samples, or False, for those held out")
    check_whole("samples", samples, 1)
    check_whole("seed", seed, 0)


def check_index(index: int, samples: int) -> None:
    """Refuse an index beyond the samples, which also ends a ``for`` loop over them.

    Raises:
        IndexError: naming both.
    """
    if not 0 <= index < samples:
        raise IndexError(f"sample {index} of {samples}")
