"""What the two layers do with an input before they convolve it: check it, and let tracers have it."""

from typing import Any

import torch
from torch import Tensor, fx, nn


def check_input(x: Tensor, channels: int, layout: str) -> None:
    if x.ndim != len(layout.split(", ")) or x.shape[1] != channels:
        raise ValueError(f"x is {tuple(x.shape)}; this layer takes ({layout}) with C={channels}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x is {tuple(x.shape)}: it has no token; this layer needs at least one")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; this layer takes floating point: convert it with x.float()")


def of_one_size(x: Tensor) -> Tensor:
    """x. A trace holds for one size: at any other size it has to fail, and not to convolve something else."""
    return x.expand(-1, -1, *map(int, x.shape[2:])) if torch.jit.is_tracing() else x


def record_whole(layer: nn.Module, x: fx.Proxy, **options: Any) -> Any:
    """The layer as one node of a symbolic trace, which knows no shapes: torch's own layers are recorded so too."""
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), options)
