"""What one call of SGConv or SGConv2d costs, and hooks that tell it to counters that take a rule by type of module."""

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..longconv import BACKENDS, choose_backend, cost
from ..models.layer import SGConv, SGConv2d

Layer = SGConv | SGConv2d


class LayerCost(NamedTuple):
    """MACs of making the taps, of the algorithm, and of what its backend executes; and the number of outputs."""

    kernel: float
    algorithm: float
    executed: float
    activations: int


def layer_cost(layer: Layer, output: Tensor | tuple[Tensor, ...]) -> LayerCost:
    """The cost of the call that returned this."""
    y = output[0] if isinstance(output, tuple) else output  # the kernel was asked for too
    dilation = getattr(layer, "dilation", 1)  # each of its maps is a signal
    phase = [-(-int(size) // dilation) for size in y.shape[2:]]
    batch, channels, length = int(y.shape[0]) * dilation ** len(phase), layer.channels, math.prod(phase)
    signal = y.new_empty(1).expand(batch, channels, length)  # takes no memory
    backend = choose_backend(signal) if layer.backend == "auto" else layer.backend
    num_taps = 2 * length - 1 if layer.bidirectional else length
    return LayerCost(
        cost.linear_interpolation(interpolated_taps(layer)) / 2,
        cost.paper(batch, channels, length) / 2,
        BACKENDS[backend].flops(batch, channels, length, num_taps) / 2,
        math.prod(map(int, y.shape)),
    )


def interpolated_taps(layer: Layer) -> int:
    """Taps that are interpolated to make the kernel: those of the third scale and the later ones that it reaches."""
    if layer.taps is not None:
        return 0  # they were made by `reparameterize`
    directions, num_scales, channels, scale_dim = map(int, layer.weight.shape)  # tensors while it is traced
    sizes = [2 ** (i - 1) * scale_dim for i in range(2, num_scales)]  # of a scale, and of all before it together
    return directions * channels * sum(size for size in sizes if size < layer.length)


def _macs(layer: Layer, output: Any) -> int:
    """Of a call, by the algorithm's count as in `sgconvnext.profile.flops`, with the kernel that it made."""
    call = layer_cost(layer, output)
    return round(call.kernel + call.algorithm)


def _tell_thop(layer: Any, _: Any, output: Any) -> None:
    layer.total_ops += _macs(layer, output)


def _tell_ptflops(layer: Any, _: Any, output: Any) -> None:
    layer.__flops__ += _macs(layer, output)


# thop.profile(model, (images,), custom_ops=THOP)
THOP = {SGConv: _tell_thop, SGConv2d: _tell_thop}
# ptflops.get_model_complexity_info(model, (3, 224, 224), custom_modules_hooks=PTFLOPS)
PTFLOPS = {SGConv: _tell_ptflops, SGConv2d: _tell_ptflops}
