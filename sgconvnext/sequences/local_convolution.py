"""A local convolution as a token mixer: what SGConv is compared with."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class LocalConvolution(nn.Module):
    """Depthwise convolution of a few taps, GELU, dropout and a projection: `SGConvMixer` without the global kernel.

    Args:
        channels: C.
        kernel_size: taps; an odd number unless it is causal.
        causal: whether the taps are of the tokens before.
        dropout: probability that a value is dropped.
        device, dtype: of the parameters.

    Raises:
        ValueError: the number of taps has no middle.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 7,
        causal: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or (kernel_size % 2 == 0 and not causal):
            raise ValueError(f"kernel_size={kernel_size} must be an odd number of taps, at least 1")
        dd = {"device": device, "dtype": dtype}
        before = kernel_size - 1 if causal else kernel_size // 2
        self.padding = (before, kernel_size - 1 - before)
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels, **dd)
        self.drop = nn.Dropout(dropout)
        self.project = nn.Linear(channels, channels, **dd)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Map x (B, L, C) to y (B, L, C); tokens that are not ``seen`` (B, L) count as zero."""
        x = x if seen is None else x * seen[..., None]
        y = self.conv(F.pad(x.mT, self.padding)).mT
        return self.project(self.drop(F.gelu(y)))

    def step(self, x: Tensor, state: Any = None) -> Any:
        """Refused: only SGConv and attention keep states.

        Raises:
            ValueError: always.
        """
        raise ValueError("a local convolution keeps no state; generate with a network of the letters A and C")

    prefill = step
