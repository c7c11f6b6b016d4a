"""Parameters of the released layer: what it computes by its equations, in float64, is what ours computes with them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import refused, relative_error
from torch import Tensor

from sgconvnext import SGConv, SGConvMixer, from_released


def released(
    channels: int = 4, scale_dim: int = 8, num_scales: int = 4, heads: int = 1, **options: Any
) -> dict[str, Tensor]:
    """A state dict as the released layer saves it, with its norm measured."""
    directions = 2 if options.get("bidirectional") else 1
    kernels = directions * heads
    state = {f"kernel_list.{i}": torch.randn(kernels, channels, scale_dim) for i in range(num_scales)}
    state |= {"D": torch.randn(heads, channels)}
    if options.get("learnable"):
        state |= {"decay": 0.5 + torch.rand(channels), "multiplier": torch.tensor(1.0)}
    else:
        state |= {"multiplier": torch.linspace(*options.get("growth", (2, 2)), channels).view(1, -1, 1)}
    whole = unscaled(state, options.get("nearest", False))
    return state | {
        "kernel_norm": whole.norm(dim=-1, keepdim=True).float(),
        "kernel_norm_initialized": torch.tensor(True),
    }


def unscaled(state: dict[str, Tensor], nearest: bool) -> Tensor:
    """k before the norm (directions heads, C, 2^(N-1) d), tap by tap, in float64."""
    num_scales = sum(key.startswith("kernel_list") for key in state)
    growth, parts = state["multiplier"].double(), []
    for i in range(num_scales):
        w, stretch = state[f"kernel_list.{i}"].double(), 2 ** max(0, i - 1)
        taps = []
        for j in range(w.shape[-1] * stretch):
            place = (j + 0.5) / stretch - 0.5
            if nearest:
                taps.append(w[..., j // stretch])
                continue
            low = min(max(math.floor(place), 0), w.shape[-1] - 1)
            high = min(max(math.floor(place) + 1, 0), w.shape[-1] - 1)
            share = place - math.floor(place)
            taps.append((1 - share) * w[..., low] + share * w[..., high])
        parts.append(torch.stack(taps, dim=-1) * growth ** (num_scales - 1 - i))
    k = torch.cat(parts, dim=-1)
    if "decay" in state:
        k = k * torch.arange(1, k.shape[-1] + 1) ** -state["decay"].double()[:, None]
    return k


def outputs(state: dict[str, Tensor], x: Tensor, nearest: bool) -> tuple[Tensor, Tensor]:
    """y (B, heads C, T), and the taps by lag from -(T-1) on (heads C, 2T-1)."""
    heads = state["D"].shape[0]
    length = x.shape[-1]
    k = (unscaled(state, nearest) / state["kernel_norm"].double())[..., :length].unflatten(0, (-1, heads))
    ahead = k[1].flip(-1) if len(k) == 2 else torch.zeros_like(k[0])
    by_lag = torch.cat([ahead[..., 1:], k[0]], dim=-1).flatten(0, 1)  # the last tap of k- is of lag -T
    t = torch.arange(length)
    matrix = by_lag[:, t[:, None] - t + length - 1]
    signal = x.double().repeat(1, heads, 1)
    return torch.einsum("kts,bks->bkt", matrix, signal) + state["D"].double().flatten()[:, None] * signal, by_lag


MODES: list[dict[str, Any]] = [
    {},
    {"bidirectional": True},
    {"heads": 3, "bidirectional": True},
    {"nearest": True},
    {"learnable": True},
    {"growth": (1, 3)},
    {"num_scales": 1},
    {"num_scales": 2},
]


@pytest.mark.parametrize("length", [1, 33, 64])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_kernel_and_output_are_those_of_the_released_layer(mode: dict[str, Any], length: int) -> None:
    state, nearest = released(**mode), mode.get("nearest", False)
    layer = from_released(state, nearest=nearest)
    assert isinstance(layer, SGConv)
    length = min(length, layer.length)
    x = torch.randn(2, 4, length)
    want, by_lag = outputs(state, x, nearest)
    y, kernel = layer(x, return_kernel=True)
    assert relative_error(y, want) <= 2e-6
    assert relative_error(layer(x), want) <= 2e-6
    assert relative_error(kernel[0], by_lag[:, length - 1 :]) <= 2e-6


@pytest.mark.parametrize("glu", [False, True])
def test_projection_comes_along(glu: bool) -> None:
    state = released(heads=2)
    name = "output_linear.0" if glu else "output_linear"
    state |= {f"{name}.weight": torch.randn(8 if glu else 4, 8), f"{name}.bias": torch.randn(8 if glu else 4)}
    mixer, x = from_released(state, dropout=0.1), torch.randn(2, 4, 30)
    assert isinstance(mixer, SGConvMixer)
    y = F.gelu(outputs(state, x, nearest=False)[0].mT)
    want = F.linear(y, state[f"{name}.weight"].double(), state[f"{name}.bias"].double())
    want = F.glu(want, dim=-1) if glu else want
    assert relative_error(mixer.eval()(x.mT), want) <= 2e-6


def test_shorter_layer_has_the_first_taps() -> None:
    state = released()
    x = torch.randn(1, 4, 40)
    assert relative_error(from_released(state, 40)(x), from_released(state)(x)) <= 2e-6
    with refused("length=32", "33 to 64"):
        from_released(state, 32)


def test_state_dict_of_something_else_is_refused() -> None:
    state = released()
    with refused("'D'", "missing", "prefix"):
        from_released({f"layer.{key}": value for key, value in state.items()})
    with refused("kernel_norm", "call the released layer once"):
        from_released(state | {"kernel_norm_initialized": torch.tensor(False)})
    with refused("'norm.norm.m'", "ln=True"):
        from_released(state | {"norm.norm.m": torch.zeros(1)})
    with refused("decay by position", "multiplier"):
        from_released(released(learnable=True) | {"multiplier": torch.tensor(2.0)})
    with refused("multiplier", "evenly"):
        from_released(state | {"multiplier": torch.tensor([1.0, 1.0, 2.0, 2.0]).view(1, -1, 1)})
