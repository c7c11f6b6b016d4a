"""The convolution of a layer with its taps, and what inference on a CPU keeps of them from one forward to the next."""

from typing import Any

import torch
from torch import Tensor

from ..longconv import choose_backend, freeze, long_conv
from ..longconv.context import runs_eagerly_on_cpu
from .kept import forget, kept, kept_while_equal

# Of a layer that is not reparameterized: above it a forward takes long anyway, and memory may be short.
KEPT_BYTES = 2**24  # of spectra


def convolve(layer: Any, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """x (B, C, L) convolved with the layer's taps for a map, or signal, of that size.

    Inference on a CPU keeps what the backend makes of the taps (spectra, a matrix) for the last size, as long as
    weights and options have the same values.
    """
    frozen, length = layer.taps is not None, x.shape[-1]
    backend = choose_backend(x, layer.backend, one_length=layer.is_built_for(size), frozen=frozen)
    sources = [layer.taps] if frozen else [layer.weight, layer.skip, layer.kernel_norm]
    if layer.exponent is not None:
        sources.append(layer.exponent)
    able = (frozen or is_kept(x.shape[1], length)) and runs_eagerly_on_cpu(x, *sources)
    if able and not torch.is_grad_enabled():
        key = (size, x.dtype, backend, layer.options)
        keep = kept if frozen else kept_while_equal
        return keep(layer, key, sources, lambda: freeze(layer._taps_for(size), length, x.dtype, backend))(x)
    if able and not frozen:
        forget(layer)  # the step of an optimiser follows
    return long_conv(x, layer._taps_for(size), backend)


def is_kept(channels: int, length: int) -> bool:
    """Whether inference on a CPU keeps what it makes of taps for such signals, if they are not reparameterized."""
    return 8 * channels * length <= KEPT_BYTES
