"""What one call of SGConv or SGConv2d costs, and hooks that tell the counters of thop and ptflops."""

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..longconv import BACKENDS, choose_backend, cost
from ..models.layer import SGConv2d
from ..sequences.layer import SGConv


class LayerCost(NamedTuple):
    """MACs of making the taps, of the paper's algorithm, and of what the backend executes; the number of outputs."""

    kernel: float
    algorithm: float
    executed: float
    activations: int


def layer_cost(layer: SGConv | SGConv2d, output: Tensor | tuple[Tensor, ...]) -> LayerCost:
    """The cost of the call of a layer that returned ``output``."""
    y = output[0] if isinstance(output, tuple) else output  # a tuple if the kernel was asked for too
    y = y.mT if getattr(layer, "channels_last", False) else y
    dilation = getattr(layer, "dilation", 1)  # each of the r x r subsampled maps is a signal
    phase = [-(-int(size) // dilation) for size in y.shape[2:]]
    batch, channels = int(y.shape[0]) * dilation ** len(phase), layer.heads * layer.channels
    phase[-1] += getattr(layer, "row_gap", 0)  # the zero columns are convolved too
    length = math.prod(phase)
    signal = y.new_empty(1).expand(batch, channels, length)  # takes no memory
    num_taps = 2 * length - 1 if layer.bidirectional else length
    return LayerCost(
        cost.linear_interpolation(interpolated_taps(layer)) / 2,
        cost.algorithm(batch, channels, length) / 2,
        BACKENDS[choose_backend(signal, layer.backend)].flops(batch, channels, length, num_taps) / 2,
        math.prod(map(int, y.shape)),
    )


def interpolated_taps(layer: SGConv | SGConv2d) -> int:
    """Taps that are interpolated to make the kernel: all of the third scale and of later ones that it reaches."""
    if layer.taps is not None:
        return 0  # they were made by `reparameterize`
    directions, num_scales, channels, scale_dim = map(int, layer.weight.shape)  # tensors while it is traced
    sizes = [2 ** (i - 1) * scale_dim for i in range(2, num_scales)]  # of a scale, and of all before it together
    return directions * channels * sum(size for size in sizes if size < layer.length)


def _macs(layer: SGConv | SGConv2d, output: Any) -> int:
    """MACs of a call, counted as the paper's algorithm, as `sgconvnext.profile.flops` does, and of making the taps."""
    call = layer_cost(layer, output)
    return round(call.kernel + call.algorithm)


def _tell_thop(layer: Any, _: Any, output: Any) -> None:
    layer.total_ops += _macs(layer, output)


def _tell_ptflops(layer: Any, _: Any, output: Any) -> None:
    layer.__flops__ += _macs(layer, output)


LAYERS: tuple[type, ...] = (SGConv, SGConv2d)
# thop.profile(model, (images,), custom_ops=THOP)
THOP = dict.fromkeys(LAYERS, _tell_thop)
# ptflops.get_model_complexity_info(model, (3, 224, 224), custom_modules_hooks=PTFLOPS)
PTFLOPS = dict.fromkeys(LAYERS, _tell_ptflops)
