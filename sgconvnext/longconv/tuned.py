"""Backends that were measured to be the fastest here, which `choose_backend` takes: `sgconvnext.tune` fills the table.

Nothing in this module measures. Without an entry the shipped thresholds of `choice` hold.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from .precision import product_dtype

T = TypeVar("T")
Work = Literal["training", "inference", "frozen"]  # forward and backward; forward; forward with fixed taps
NEAR = 2  # a choice holds for batches from half to twice the one that was measured


class Convolution(NamedTuple):
    """What a choice is made for, but for the batch. It holds for causal taps too, but is measured with two-sided ones.

    Args:
        device: type of the device.
        dtype: in which the convolution multiplies, autocast considered.
        channels, length: C and L of signals (B, C, L).
        work: what is done.
    """

    device: str
    dtype: torch.dtype
    channels: int
    length: int
    work: Work


class Asked(NamedTuple):
    """A convolution that a network asked a backend for, and the signals that it had."""

    convolution: Convolution
    batch: int
    dtype: torch.dtype  # of the signals, as they came
    channels_last: bool
    one_length: bool  # as in `choose_backend`


_TUNED: dict[Convolution, dict[int, str]] = {}  # to the backend by batch
_LISTENERS: list[list[Asked]] = []


def convolution(x: Tensor, length: int, frozen: bool) -> Convolution:
    """The convolution of signals like x (B, C, ...), but L long."""
    work: Work = "training" if torch.is_grad_enabled() else "frozen" if frozen else "inference"
    return Convolution(x.device.type, product_dtype(x), x.shape[1], length, work)


def choice(x: Tensor, batch: int, length: int, one_length: bool, frozen: bool) -> str | None:
    """The backend that was measured to be the fastest for signals like x; None if nothing was measured.

    Arguments as of `choose_backend`.
    """
    for asked in _LISTENERS:
        channels_last = x.stride(1) == 1 and x.shape[1] > 1
        asked.append(Asked(convolution(x, length, frozen), batch, x.dtype, channels_last, one_length))
    if not _TUNED:
        return None
    return nearest(_TUNED.get(convolution(x, length, frozen), {}), batch)


def nearest(measured: dict[int, T], size: int) -> T | None:
    """Of what was measured at some sizes, what is for the nearest, from half to twice this one; None without one."""
    found, distance = None, float(NEAR)
    for its_size, value in measured.items():  # spelled out: the compiler takes no key of min
        ratio = max(its_size, size) / max(1, min(its_size, size))
        if ratio <= distance:
            found, distance = value, ratio
    return found


def prefer(which: Convolution, batch: int, backend: str) -> None:
    """Let "auto" take a backend for a convolution, from now on and in the whole process."""
    _TUNED.setdefault(which, {})[batch] = backend


@contextlib.contextmanager
def undone_by_an_error() -> Iterator[None]:
    """What is preferred in the block holds on only if the block ends well."""
    before = {which: dict(by_batch) for which, by_batch in _TUNED.items()}
    try:
        yield
    except BaseException:
        _TUNED.clear()
        _TUNED.update(before)
        raise


def forget() -> None:
    """Let "auto" take what the shipped thresholds say again."""
    _TUNED.clear()


@contextlib.contextmanager
def listening() -> Iterator[list[Asked]]:
    """The convolutions for which a backend is asked in the block."""
    asked: list[Asked] = []
    _LISTENERS.append(asked)
    try:
        yield asked
    finally:
        _LISTENERS.remove(asked)
