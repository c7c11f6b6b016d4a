"""What a run raises once it is under way, and how an error becomes one line."""

import re
from collections.abc import Iterable
from typing import Any

import torch


class UnknownArgumentError(TypeError, ValueError):
    """A model has no argument of that name: Python and timm raise a TypeError, this package ValueErrors."""


class DataError(ValueError):
    """The data, found while reading it, cannot be trained on."""


class TooManyUnreadableError(DataError):
    """Agreed on by all processes, where a DataError otherwise comes from one of them."""


class NonFiniteError(FloatingPointError):
    """Training cannot go on; ``report`` has what a replay of the update needs."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


def one_line(error: BaseException) -> str:
    """The message without line breaks and a terminal's colours; the type's name where there is none."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error))
    return " ".join(plain.split()) or type(error).__name__


def shortened(names: Iterable[object], most: int = 5) -> str:
    """``a, b, c, ...``"""
    names = list(names)
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory; the CPU's allocator has no exception of its own."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "Storage size calculation overflowed"))
