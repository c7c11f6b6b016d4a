"""Multi-scale convolution kernels: parameters -> taps, as pure functions (arXiv 2210.09298, section 3.1).

Letters: C channels, L tokens, N scales, d taps per scale; "directions" is 1 (causal) or 2 (bidirectional).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def num_scales_for(length: int, scale_dim: int) -> int:
    """Scales that cover a length: N = 1 + ceil(log2(L / d)), at least 1."""
    return 1 + (-(-length // scale_dim) - 1).bit_length()


def scale_dim_for(length: int, num_scales: int) -> int:
    """Taps per scale that cover a length: d = ceil(L / 2^(N-1))."""
    return -(-length // 2 ** (num_scales - 1))


def multiscale_kernel(weight: Tensor, length: int, decay: str, alpha: tuple[float, float], exponent: float) -> Tensor:
    """Concatenate the upsampled scales of each channel, decayed but not yet normalised (Eq. 1).

        k = [k_0, k_1, ..., k_{N-1}],   k_i = a_i * Upsample_{2^max(i-1,0) d}(w_i),   cut to L taps

    where Upsample is linear interpolation with ``align_corners=False``, and

        decay="scale":    a_i = alpha_c^i; alpha_c runs over the channels from alpha[0] to alpha[1], evenly in 1/alpha
        decay="position": a_i = 1, and tap j of k is multiplied by (j + 1)^-exponent   (Cat*, section 4.1.2)

    Args:
        weight: parameters (directions, N, C, d), float32 or float64.
        length: taps to keep, L <= 2^(N-1) d.
        decay: "scale" or "position".
        alpha: decay per scale of the first and the last channel; read when decay="scale".
        exponent: t of the power law; read when decay="position".

    Returns:
        kernel (directions, C, L) in the dtype of weight; tap j is lag j of k+ and lag -j-1 of k-.
    """
    if decay == "scale":
        channels = weight.shape[2]
        inverse = torch.linspace(1 / alpha[0], 1 / alpha[1], channels, device=weight.device, dtype=weight.dtype)
        scale = torch.arange(weight.shape[1], device=weight.device)
        factor = inverse[:, None] ** scale[:, None, None]
        weight = weight / factor.to(weight.dtype)  # which it has, but not in ONNX, where linspace is float64
    size = weight.shape[3]
    scales = [weight[:, 0]]
    end = size
    for i in range(1, weight.shape[1]):
        if end >= length:  # scales beyond the length have no tap
            break
        if i > 1:  # the first two scales are d long, each later one doubles
            size = size * 2  # not *=: torch.jit.trace has tensors for sizes, and end may be the same one
        scales.append(weight[:, i])
        if i > 1:
            scales[i] = F.interpolate(scales[i], size=size, mode="linear", align_corners=False)
        end = end + size
    kernel = torch.cat(scales, dim=-1)[..., :length]
    if decay == "position":
        position = torch.arange(1, length + 1, device=weight.device, dtype=weight.dtype)
        kernel = kernel * position ** (-exponent)
    return kernel


def kernel_norm(kernel: Tensor) -> Tensor:
    """Z of Eq. 1: the L2 norm (directions, C, 1) of each kernel (directions, C, L) as it is used, after truncation."""
    return torch.linalg.vector_norm(kernel, dim=-1, keepdim=True)


def lag_taps(kernel: Tensor, skip: Tensor) -> Tensor:
    """Order the taps by lag and add the skip connection to lag 0, where it is one more tap.

        bidirectional: lags -(L-1) .. L-1;  K[lag] = k+[lag] for lag >= 0, k-[-lag-1] for lag < 0
        causal:        lags 0 .. L-1;       K[lag] = k+[lag]

    Args:
        kernel: (directions, C, L); k+ first, then k-, whose last tap (lag -L) no output reaches.
        skip: D of the paper (C).

    Returns:
        taps (C, 2L-1) for two directions, (C, L) for one.
    """
    behind = torch.cat([kernel[0, :, :1] + skip[:, None], kernel[0, :, 1:]], dim=-1)  # lags >= 0: tokens of the past
    if kernel.shape[0] == 1:
        return behind
    return torch.cat([kernel[1, :, :-1].flip(-1), behind], dim=-1)
