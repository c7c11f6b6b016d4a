"""Multi-scale convolution kernels: parameters -> taps, as pure functions (arXiv 2210.09298, section 3.1).

Letters: C channels, L tokens, N scales, d taps per scale; "directions" is 1 (causal) or 2 (bidirectional).
"""

import math
from collections.abc import Sequence
from inspect import signature
from numbers import Real
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Every kind of decay, and the options that it uses beside ``init``
DECAYS: dict[str, tuple[str, ...]] = {"scale": ("alpha",), "position": ("exponent",)}
CHOICES: dict[str, tuple[str, ...]] = {
    "decay": tuple(DECAYS),
    "init": ("normal", "cosine"),
    "upsample": ("linear", "nearest"),
    "norm_over": ("used", "whole"),
}


class KernelOptions(NamedTuple):
    """What a kernel is beside its parameters; `kernel_options` checks the values and has the defaults."""

    decay: str
    alpha: tuple[float, float]
    exponent: float
    init: str
    upsample: str
    norm_over: str


def kernel_options(
    decay: str = "scale",
    alpha: float | tuple[float, float] = 0.5,
    exponent: float = 1.0,
    init: str = "normal",
    upsample: str = "linear",
    norm_over: str = "used",
) -> KernelOptions:
    """The options of a kernel.

    Args:
        decay: "scale" (alpha^i on scale i) or "position" ((j + 1)^-exponent on tap j: Cat*, section 4.1.2).
        alpha: decay per scale; a pair spreads it over the channels, evenly in 1/alpha (Pathfinder-X: (1, 1/3)).
        exponent: t of decay="position".
        init: "normal" (w ~ N(0, 1)) or "cosine" (one random frequency per channel, direction and scale).
        upsample: how a scale becomes taps: "linear", or "nearest" as in a mode of the authors' layer.
        norm_over: the taps whose L2 norm is 1 at initialisation: those that are "used", or the "whole" of
            2^(N-1) d taps before they are cut, as in the authors' layer.

    Raises:
        ValueError: an unknown choice, or a number that makes no kernel.
    """
    for name, choice in (("decay", decay), ("init", init), ("upsample", upsample), ("norm_over", norm_over)):
        if choice not in CHOICES[name]:
            raise ValueError(f"{name} {choice!r} is unknown; use one of {', '.join(CHOICES[name])}")
    alphas = tuple(alpha) if isinstance(alpha, Sequence) else (alpha, alpha)
    if len(alphas) != 2 or not all(isinstance(a, Real) and 0 < a < math.inf for a in alphas):
        raise ValueError(f"alpha={alpha!r} must be a positive number, or a pair of them")
    if not isinstance(exponent, Real) or not math.isfinite(exponent):
        raise ValueError(f"exponent={exponent!r} must be a finite number")
    return KernelOptions(decay, (float(alphas[0]), float(alphas[1])), float(exponent), init, upsample, norm_over)


# by name; a dict would be a constant for TorchScript, which has none
KERNEL_DEFAULTS = MappingProxyType({key: each.default for key, each in signature(kernel_options).parameters.items()})


def num_scales_for(length: int, scale_dim: int) -> int:
    """Scales that cover a length: N = 1 + ceil(log2(L / d)), at least 1."""
    return 1 + (-(-length // scale_dim) - 1).bit_length()


def scale_dim_for(length: int, num_scales: int) -> int:
    """Taps per scale that cover a length: d = ceil(L / 2^(N-1))."""
    return -(-length // 2 ** (num_scales - 1))


def multiscale_kernel(weight: Tensor, length: int, options: KernelOptions, exponent: Tensor | None = None) -> Tensor:
    """Concatenate the upsampled scales of each channel, decayed but not yet normalised (Eq. 1).

        k = [k_0, k_1, ..., k_{N-1}],   k_i = a_i * Upsample_{2^max(i-1,0) d}(w_i),   cut to L taps

    where Upsample is linear interpolation with ``align_corners=False`` (or repeats the nearest parameter), and

        decay="scale":    a_i = alpha_c^i; alpha_c runs over the channels from alpha[0] to alpha[1], evenly in 1/alpha
        decay="position": a_i = 1, and tap j of k is multiplied by (j + 1)^-exponent   (Cat*, section 4.1.2)

    Args:
        weight: parameters (directions, N, C, d), float32 or float64.
        length: taps to keep, L <= 2^(N-1) d.
        options: of the kernel.
        exponent: one for each channel (C), in place of the one in the options.

    Returns:
        kernel (directions, C, L) in the dtype of weight; tap j is lag j of k+ and lag -j-1 of k-. The channels of a
        tap lie side by side in memory.
    """
    weight = weight.transpose(2, 3).contiguous()  # (directions, N, d, C): every step then works on whole rows
    if options.decay == "scale":
        weight = weight / inverse_decay(weight, options)
    size = weight.shape[2]
    scales = [weight[:, 0]]
    covered = size
    for i in range(1, weight.shape[1]):
        if covered >= length:  # scales beyond the length have no tap
            break
        if i > 1:  # the first two scales are d long, each later one doubles
            size = size * 2  # not *=: torch.jit.trace has tensors for sizes, and covered may be the same one
        scales.append(weight[:, i] if i == 1 else _upsample(weight[:, i], size, options.upsample))
        covered = covered + size
    kernel = torch.cat(scales, dim=1)[:, :length]
    if options.decay == "position":
        if exponent is None:
            kernel = kernel * _positions(kernel) ** (-options.exponent)
        else:
            kernel = kernel * _positions(kernel) ** (-exponent.to(kernel.dtype))
    return kernel.transpose(1, 2)


def inverse_decay(weight: Tensor, options: KernelOptions) -> Tensor:
    """alpha_c^-i (N, 1, C) for a weight (directions, N, d, C)."""
    start, end = options.alpha
    inverse = torch.linspace(1 / start, 1 / end, weight.shape[3], device=weight.device, dtype=weight.dtype)
    scale = torch.arange(weight.shape[1], device=weight.device)
    factor = inverse ** scale[:, None, None]
    return factor.to(weight.dtype)  # in ONNX linspace is float64 whatever its dtype here


def _positions(kernel: Tensor) -> Tensor:
    """j + 1 of every tap (L, 1) of a kernel (directions, L, C)."""
    return torch.arange(1, kernel.shape[1] + 1, device=kernel.device, dtype=kernel.dtype)[:, None]


def nearest_weight(kernel: Tensor, num_scales: int, scale_dim: int, options: KernelOptions) -> Tensor:
    """The weight whose `multiscale_kernel` is nearest to a kernel: the inverse where there is one.

    The first two scales have a parameter for each tap, which it takes over. The later ones have fewer. There it solves
    for the least squares of the difference; of decay="position", before the decay.

    Args:
        kernel: (directions, C, L), L <= 2^(N-1) d.
        num_scales: N.
        scale_dim: d.
        options: of the kernel.

    Returns:
        weight (directions, N, C, d) in float64.
    """
    kernel = kernel.double().transpose(1, 2)  # (directions, L, C)
    if options.decay == "position":
        kernel = kernel * _positions(kernel) ** options.exponent
    weight = kernel.new_zeros(kernel.shape[0], num_scales, scale_dim, kernel.shape[2])
    first = 0
    for i in range(num_scales):
        size = scale_dim * 2 ** max(i - 1, 0)
        taps = kernel[:, first : first + size]  # the last scale is cut
        if i < 2:
            weight[:, i, : taps.shape[1]] = taps
        elif not taps.is_meta and taps.any():  # a converted ConvNeXt has none here
            unit = torch.eye(scale_dim, dtype=kernel.dtype, device=kernel.device)
            upsample = _upsample(unit[None], size, options.upsample)[0, : taps.shape[1]]
            weight[:, i] = torch.linalg.pinv(upsample.T @ upsample, hermitian=True) @ (upsample.T @ taps)
        first += size
    if options.decay == "scale":
        weight = weight * inverse_decay(weight, options)
    return weight.transpose(2, 3).contiguous()


def _upsample(scale: Tensor, size: int, how: str) -> Tensor:
    """(directions, d, C) to (directions, size, C). torch is faster for a row of an image than a signal."""
    if how == "nearest":
        return scale.repeat_interleave(size // scale.shape[1], dim=1)
    row = scale.unsqueeze(1).permute(0, 3, 1, 2)  # (directions, C, 1, d), channels last
    return F.interpolate(row, size=(1, size), mode="bilinear", align_corners=False).squeeze(2).transpose(1, 2)


def l2_norm(kernel: Tensor) -> Tensor:
    """Z of Eq. 1: the L2 norm (directions, C, 1) of each kernel (directions, C, L)."""
    return torch.linalg.vector_norm(kernel.contiguous(), dim=-1, keepdim=True)


def lag_taps(kernel: Tensor, skip: Tensor) -> Tensor:
    """Order the taps by lag and add the skip connection to lag 0, where it is one more tap.

        bidirectional: lags -(L-1) .. L-1;  K[lag] = k+[lag] for lag >= 0, k-[-lag-1] for lag < 0
        causal:        lags 0 .. L-1;       K[lag] = k+[lag]

    Args:
        kernel: (directions, C, L); k+ first, then k-, whose last tap (lag -L) no output reaches.
        skip: D of the paper (C).

    Returns:
        taps (C, 2L-1) for two directions, (C, L) for one; in memory as the kernel is.
    """
    kernel = kernel.transpose(1, 2)
    behind = [kernel[0, :1] + skip, kernel[0, 1:]]  # lags >= 0: tokens of the past
    ahead = [] if kernel.shape[0] == 1 else [kernel[1, :-1].flip(0)]
    return torch.cat(ahead + behind).t()


def kernel_of_lags(taps: Tensor, bidirectional: bool) -> Tensor:
    """The kernel (directions, C, L) of taps by lag: what `lag_taps` orders, with a skip of zero.

    No output reaches the last tap of k-, which is zero here.
    """
    if not bidirectional:
        return taps[None]
    length = (taps.shape[1] + 1) // 2
    ahead = F.pad(taps[:, : length - 1].flip(1), (0, 1))
    return torch.stack([taps[:, length - 1 :], ahead])


def cosines(weight: Tensor) -> Tensor:
    """cos(2 pi f j / d) for a weight (directions, N, C, d): one random frequency f out of 0 .. C-1 for each row."""
    directions, scales, channels, scale_dim = weight.shape
    frequency = torch.rand(directions, scales, channels, device=weight.device).argsort(-1)
    phase = torch.arange(scale_dim, device=weight.device) / scale_dim
    return torch.cos(2 * math.pi * frequency[..., None] * phase)
