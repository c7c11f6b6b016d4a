"""Who looks on while a model runs: compilers, tracers, transforms, counters. What they see must be plain operators."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from ..longconv import is_recorded


def runs_eagerly_on_cpu(x: Tensor) -> bool:
    """Whether x is an ordinary tensor on a CPU, and nobody looks on: no graph is being built, no transform is at work.

    Nobody looks at the operators either, as a counter of FLOPs does. A counter has to see operators that it knows.
    """
    if torch.compiler.is_compiling() or is_recorded() or is_transformed() or torch._C._len_torch_dispatch_stack():
        return False
    return type(x) is Tensor and x.device.type == "cpu"


def is_transformed() -> bool:
    """Whether torch.func or forward mode is at work. Their tensors must not be kept."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def of_one_size(x: Tensor) -> Tensor:
    """x. A trace holds for one size: at any other size it has to fail, and not to convolve something else."""
    return x.expand(-1, -1, *map(int, x.shape[2:])) if torch.jit.is_tracing() else x


def record_whole(layer: nn.Module, x: fx.Proxy, **options: Any) -> Any:
    """The layer as one node of a symbolic trace, which knows no shapes: torch's own layers are recorded so too."""
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), options)
