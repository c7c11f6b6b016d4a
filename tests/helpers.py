"""What several test modules share: a scale-free error, the shape of a refusal, a model small enough to run often."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import sgconvnext

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "img_size": 64, "num_classes": 10}


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||: scale-free, so an all-zero answer scores 1 and never passes."""
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block raises a ValueError of one line that contains every one of the words: the value, and the cure."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the words below are the match
        yield
    message = str(caught.value)
    assert message
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def small_model(**kwargs: Any) -> sgconvnext.SGConvNeXt:
    """Four blocks at 64 px. Layer scale 1 instead of 1e-6, or no test would notice what the blocks compute."""
    return timm.create_model("sgconvnext_atto", **({**SMALL, "ls_init_value": 1.0} | kwargs)).eval()


def mixers(model: torch.nn.Module) -> list[sgconvnext.SGConv2d]:
    """Every SGConv2d of a model, in order."""
    return [module for module in model.modules() if isinstance(module, sgconvnext.SGConv2d)]
