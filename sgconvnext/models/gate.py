"""The gate of a block: what the convolution made of a token, scaled by a linear function of the token itself."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Gate(nn.Module):
    """y * (1 + W LN(x) + b) of tokens x (..., C) and what the convolution made of them, y (..., C).

    A convolution sums the pixels around with the same weights everywhere. The gate lets every pixel say how much of
    that sum each of its channels takes. The products in HyenaPixel (arXiv 2402.19305) and MambaOut (arXiv 2405.07992)
    do the same. W (C, C) and b (C) are 0 at first, so that a network which is given gates keeps its outputs. LN has no
    parameters, because W and b could undo them.

    Args:
        channels: C.
        eps: of LN.
        device, dtype: of the parameters.
    """

    def __init__(self, channels: int, eps: float = 1e-6, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels, device=device, dtype=dtype)  # a module that LoRA and others know
        self.channels, self.eps = channels, eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W = 0 and b = 0."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def normed(self, x: Tensor) -> Tensor:
        """LN(x)."""
        return F.layer_norm(x, (self.channels,), eps=self.eps)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The gated y."""
        return y * (1 + self.linear(self.normed(x)))
