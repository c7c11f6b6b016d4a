"""The SGConv block of the paper's Figure 6, which stands where attention stands: (B, L, C) to (B, L, C)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .generation import ConvState
from .layer import SGConv


class SGConvMixer(nn.Module):
    """SGConv, GELU, dropout and a projection that mixes heads and channels (arXiv 2210.09298, Figure 6).

        y = W dropout(GELU(SGConv(x))) + b,   with glu:  y = a * sigmoid(g),  [a, g] = W dropout(GELU(SGConv(x))) + b

    Args:
        channels: C.
        length: L, the longest signal.
        heads: kernels per channel, as of `SGConv`.
        glu: whether the projection has a gate.
        dropout: probability that a value is dropped.
        device, dtype: of the parameters.
        sgconv: further arguments of `SGConv`: bidirectional, scale_dim, decay, ...

    Raises:
        ValueError: as `SGConv`, or dropout is no probability below 1.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        heads: int = 1,
        glu: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **sgconv: Any,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout!r} must be at least 0 and below 1")
        dd = {"device": device, "dtype": dtype}
        self.sgconv = SGConv(channels, length, heads=heads, channels_last=True, **dd, **sgconv)
        self.drop = nn.Dropout(dropout)
        self.project = nn.Linear(heads * channels, channels * (2 if glu else 1), **dd)
        self.glu = glu

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Map x (B, L, C) to y (B, L, C); tokens that are not ``seen`` (B, L) count as zero."""
        return self._project(self.sgconv(x if seen is None else x * seen[..., None]))

    def step(self, x: Tensor, state: ConvState | None = None) -> tuple[Tensor, ConvState]:
        """One output (B, C) from one input (B, C), as `SGConv.step`."""
        y, state = self.sgconv.step(x, state)
        return self._project(y), state

    def prefill(self, x: Tensor, state: ConvState | None = None) -> tuple[Tensor, ConvState]:
        """The outputs (B, T, C) of a chunk (B, T, C), as `SGConv.prefill`."""
        y, state = self.sgconv.prefill(x, state)
        return self._project(y), state

    def _project(self, y: Tensor) -> Tensor:
        y = self.project(self.drop(F.gelu(y)))
        return F.glu(y, dim=-1) if self.glu else y
