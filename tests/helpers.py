"""What several test modules share: backends, a scale-free error, cases of the long convolution, a small model."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

import sgconvnext
from sgconvnext.longconv import available_backends, long_conv, reference
from sgconvnext.models.gate import Gate

BACKENDS_HERE = available_backends(torch.zeros(1, 1, 1))  # of float32 on a CPU
SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "img_size": 64, "num_classes": 10}
GAP: dict[str, Any] = {"row_gap": 3, "bias": True}  # of the _gap3 models
GATED: dict[str, Any] = {"gate": True, "mlp_ratio": 3.5}  # of the _gated models


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


class Case(NamedTuple):
    """Inputs, and what the definition makes of them in float64."""

    x: Tensor  # (B, C, L)
    taps: Tensor  # (C, 2L-1), or (C, L) when causal
    dy: Tensor  # (B, C, L)
    truth: dict[str, Tensor]  # y, dx, dtaps


@cache
def case(length: int, causal: bool, dtype: torch.dtype = torch.float32, size: tuple[int, int] | None = None) -> Case:
    """Random signals in a dtype, taps in float32 as a layer makes them; the truth is that of the rounded inputs.

    ``size`` is (B, C), which otherwise are small numbers.
    """
    generator = torch.Generator().manual_seed(length)
    batch, channels = size or ((3, 2) if length < 1000 else (2, 1))
    x = torch.randn(batch, channels, length, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(batch, channels, length, generator=generator, dtype=torch.float64).to(dtype)
    num_taps = length if causal else 2 * length - 1
    taps = torch.randn(channels, num_taps, generator=generator, dtype=torch.float64)
    taps = taps.to(torch.float64 if dtype == torch.float64 else torch.float32)
    exact = [tensor.double().requires_grad_() for tensor in (x, taps)]
    y = reference.long_conv(*exact)
    dx, dtaps = torch.autograd.grad(y, exact, dy.double())
    return Case(x, taps, dy, {"y": y.detach(), "dx": dx, "dtaps": dtaps})


def run(x: Tensor, taps: Tensor, dy: Tensor, backend: str) -> dict[str, Tensor]:
    """y, and the gradients dx and dtaps."""
    x, taps = x.detach().requires_grad_(), taps.detach().requires_grad_()
    y = long_conv(x, taps, backend)
    dx, dtaps = torch.autograd.grad(y, [x, taps], dy)
    return {"y": y, "dx": dx, "dtaps": dtaps}


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def sliced(tensor: Tensor) -> Tensor:
    """The same values as every second element, from 1 on, of a larger tensor that is NaN elsewhere."""
    larger = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
    view = larger[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    """The same values with the channels innermost, as a channels-last feature map has them once it is flattened."""
    return tensor.mT.contiguous().mT


def laid_out(inputs: Case, layout: Callable[[Tensor], Tensor]) -> Case:
    return inputs._replace(x=layout(inputs.x), taps=layout(inputs.taps), dy=layout(inputs.dy))


def saved_bytes(x: Tensor, taps: Tensor, conv: Callable[[Tensor, Tensor], Tensor]) -> int:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        conv(x.clone().requires_grad_(), taps.clone().requires_grad_())
    return sum(sizes)


def small_model(**kwargs: Any) -> sgconvnext.SGConvNeXt:
    """Four blocks at 64 px. Layer scale 1 instead of 1e-6, or no test would notice what the blocks compute."""
    return timm.create_model("sgconvnext_atto", **({**SMALL, "ls_init_value": 1.0} | kwargs)).eval()


def visible(model: Any) -> Any:
    """The model with weights of a size at which every layer counts; a layer scale of 1e-6 would hide the blocks."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        mean, deviation = (0.0, 0.05) if parameter.ndim > 1 else (1.0, 0.1)
        torch.nn.init.normal_(parameter, mean, deviation, generator)
    return model.eval()


def random_gates(model: Any) -> Any:
    """The model with weights in its gates that are not 0, as they are at first."""
    for module in model.modules():
        if isinstance(module, Gate):
            nn.init.normal_(module.linear.weight, std=0.3)
            nn.init.normal_(module.linear.bias, std=0.3)
    return model


def in_the_authors_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ConvNeXt's state dict in timm's names to one in those of facebookresearch/ConvNeXt."""
    names = {"stem.": "downsample_layers.0.", "conv_dw": "dwconv", "mlp.fc": "pwconv", "head.norm": "norm"}
    found = {}
    for key, value in state.items():
        for timms, theirs in (names | {"head.fc": "head"}).items():
            key = key.replace(timms, theirs)
        key = re.sub(r"stages\.(\d)\.blocks", r"stages.\1", key)
        found[re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", key)] = value
    return found


def hub_folder(cache: Path, repository: str) -> Path:
    """The empty folder in which the hub's client keeps the files of a repository."""
    folder, commit = cache / f"models--{repository.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def mixers(model: torch.nn.Module) -> list[sgconvnext.SGConv2d]:
    """Every SGConv2d of a model, in order."""
    return [module for module in model.modules() if isinstance(module, sgconvnext.SGConv2d)]
