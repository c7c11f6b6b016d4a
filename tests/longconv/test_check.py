"""The check of backends at some places: it agrees with the definition, and sees what is wrong at a single one."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sgconvnext.longconv import check, long_conv, reference


def inputs(length: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = torch.randn(2, batch, 4, length, dtype=torch.float64)
    return x, torch.randn(4, 2 * length - 1, dtype=torch.float64), dy


@pytest.mark.parametrize("length", [1, 2, 7, 49, 100])
def test_places_are_those_of_the_definition(length: int) -> None:
    x, taps, dy = inputs(length)
    every, lags = list(range(length)), list(range(2 * length - 1))
    x.requires_grad_()
    taps.requires_grad_()
    y = reference.long_conv(x, taps)
    dx, dtaps = torch.autograd.grad(y, [x, taps], dy)
    assert check.relative_error(check.definition(x, taps, every), y) <= 1e-13
    assert check.relative_error(check.adjoint(dy, taps, every), dx) <= 1e-13
    assert check.relative_error(check.correlation(x, dy, lags), dtaps) <= 1e-13


@pytest.mark.parametrize("backend", ["fft", "toeplitz", "dft"])
@pytest.mark.parametrize("length", [1, 5, 196])
def test_right_backends_pass(backend: str, length: int) -> None:
    found = check.truth(*inputs(length)).errors(functools.partial(long_conv, backend=backend))
    assert list(found) == list(check.ERRORS)
    assert max(found.values()) <= 1e-12


def zero(y: Tensor) -> Tensor:
    return y * 0


def last_sample(y: Tensor) -> Tensor:
    return torch.cat([y[..., :-1], y[..., -1:] * 1.01], -1)


def not_finite(y: Tensor) -> Tensor:
    return torch.cat([y[..., :-1], y[..., -1:] * torch.nan], -1)


@pytest.mark.parametrize("damage", [zero, last_sample, not_finite])
def test_wrong_output_is_seen(damage: Callable[[Tensor], Tensor]) -> None:
    x, taps, dy = inputs(196)
    truth = check.truth(x, taps, dy)
    assert not truth.errors(lambda x, taps: damage(long_conv(x, taps, "fft")))["y error"] <= 1e-4
    assert not truth.error_of_output(lambda x: damage(long_conv(x, taps, "fft")))["y error"] <= 1e-4
    assert truth.error_of_output(lambda x: long_conv(x, taps, "fft"))["y error"] <= 1e-12


class WrongGradient(torch.autograd.Function):
    """y as it is, with the gradient of one of x and the taps doubled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, which: int) -> Tensor:
        ctx.save_for_backward(x, taps)
        ctx.which = which
        return long_conv(x, taps, "fft")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, taps = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            gradients = list(torch.autograd.grad(long_conv(x, taps, "fft"), [x, taps], dy))
        gradients[ctx.which] = gradients[ctx.which] * 2
        return *gradients, None


@pytest.mark.parametrize(("which", "name"), [(0, "dx error"), (1, "dtaps error")])
def test_wrong_gradient_is_seen(which: int, name: str) -> None:
    found = check.truth(*inputs(196)).errors(lambda x, taps: WrongGradient.apply(x, taps, which))
    assert found.pop(name) > 0.9
    assert max(found.values()) <= 1e-12
