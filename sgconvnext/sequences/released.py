"""Parameters of the layer that the authors released, taken over into ours.

Their layer (github.com/ctlllll/SGConv, ``GConv``) computes the same convolution but for four things. Its kernel is

    k = [k_0, ..., k_{N-1}] / Z',   k_i = m^(N-1-i) Upsample(w_i),   so alpha = 1/m and Z = Z' / m^(N-1) in Eq. 1.

Z' is measured in the first forward, over all 2^(N-1) d taps. Ours is measured at construction over those that are
used, or as theirs with ``norm_over="whole"``. More tokens than taps are filled up with zeros there, and refused here.
What we call heads they call channels. Unless it is ``linear``, an activation, dropout and a projection follow: our
`SGConvMixer`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layer import SGConv
from .mixer import SGConvMixer

UNKNOWN = {  # parts of a key, and what they belong to
    "norm.": "ln=True",
    "weight_g": "weight_norm=True",
    "weight_v": "weight_norm=True",
    "activation.": "an activation with parameters",
}


def from_released(
    state: Mapping[str, Tensor], length: int | None = None, *, nearest: bool = False, **options: Any
) -> SGConv | SGConvMixer:
    """A layer of ours with the parameters of a released one, in one of its ``cat`` modes without ``init_scale``.

    Args:
        state: its state dict.
        length: the longest signal, at most the 2^(N-1) d taps that it has; None: all of them.
        nearest: whether its mode contains "nearest"; a state dict does not tell.
        options: of `SGConv`, such as channels_last; of `SGConvMixer`, such as dropout, if there is a projection.

    Returns:
        An `SGConv` for ``linear=True``, else an `SGConvMixer`, which takes (B, L, C).

    Raises:
        ValueError: keys are missing, or belong to an option that ours does not have; its norm was not measured yet.
    """
    _check(state)
    scales = torch.stack([state[f"kernel_list.{i}"] for i in range(_num_scales(state))], dim=1)
    kernels, num_scales, channels, scale_dim = scales.shape  # kernels: directions times heads
    heads = state["D"].shape[0]
    taps = scale_dim * 2 ** (num_scales - 1)
    kernel: dict[str, Any] = {
        "scale_dim": scale_dim,
        "bidirectional": kernels == 2 * heads,
        "heads": heads,
        "upsample": "nearest" if nearest else "linear",
        "norm_over": "whole",
    }
    length = taps if length is None else length
    if not taps // 2 < length <= taps:
        tokens = f"{taps // 2 + 1} to {taps} tokens"
        raise ValueError(f"length={length}: its {num_scales} scales of {scale_dim} taps are for {tokens}")
    growth = state["multiplier"].double().flatten()
    learned = "decay" in state
    kernel |= {"decay": "position", "learn_exponent": True} if learned else {"alpha": _alphas(growth)}
    layer: SGConv | SGConvMixer
    if any(key.startswith("output_linear") for key in state):
        layer = SGConvMixer(channels, length, glu="output_linear.0.weight" in state, **kernel, **options)
    else:
        layer = SGConv(channels, length, **kernel, **options)
    own = {
        "weight": scales,
        "skip": state["D"].flatten(),
        "kernel_norm": state["kernel_norm"].double() / growth[:, None] ** (num_scales - 1),
    }
    own |= {"exponent": state["decay"]} if learned else {}
    prefix = "" if isinstance(layer, SGConv) else "sgconv."
    own = {prefix + key: value for key, value in own.items()}
    own |= {f"project.{key.split('.')[-1]}": state[key] for key in state if key.startswith("output_linear")}
    layer.load_state_dict(own)
    return layer


def _check(state: Mapping[str, Tensor]) -> None:
    for part, option in UNKNOWN.items():
        if found := [key for key in state if part in key]:
            raise ValueError(f"{found[0]!r} is of {option}, which this layer does not have")
    if "decay" in state and not bool((state["multiplier"] == 1).all()):
        raise ValueError("it has both a decay by position and a multiplier; a released layer has one of them")
    if missing := [key for key in ("D", "multiplier", "kernel_norm", "kernel_list.0") if key not in state]:
        raise ValueError(f"{missing[0]!r} is missing: this is no state dict of a released GConv; cut off its prefix")
    if not state.get("kernel_norm_initialized", torch.tensor(True)):
        raise ValueError("its kernel_norm was never measured: call the released layer once, and save it again")


def _num_scales(state: Mapping[str, Tensor]) -> int:
    return sum(key.startswith("kernel_list.") for key in state)


def _alphas(growth: Tensor) -> tuple[float, float]:
    """alpha of the first and the last channel, between which theirs is even in 1/alpha, as ours."""
    first, last = float(growth[0]), float(growth[-1])
    even = torch.linspace(first, last, len(growth), dtype=growth.dtype)
    if not torch.allclose(growth, even, rtol=1e-2) or not all(math.isfinite(m) and m > 0 for m in (first, last)):
        raise ValueError("its multiplier is not spread evenly over the channels; this layer's alpha is")
    return 1 / first, 1 / last
