"""The ConvNeXt block with SGConv in place of the 7x7 depthwise convolution."""

import math
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from torch import Tensor, nn

from .fused import fused_forward
from .gate import Gate
from .kept import forget
from .layer import SGConv2d


class SGConvNeXtBlock(nn.Module):
    """x + DropPath(gamma * Linear(GELU(Linear(LN(y))))); y = SGConv2d(x), or Gate(SGConv2d(x), x) if gated.

    (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        input_size: H, W that the kernel is built for.
        gate: whether y is gated; see `Gate`.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: probability of dropping the branch of a sample.
        ls_init_value: initial layer scale gamma; None for no layer scale.
        norm_eps: of the LayerNorm.
        device, dtype: of the parameters.
        sgconv: further options of SGConv2d.
    """

    def __init__(
        self,
        channels: int,
        input_size: tuple[int, int],
        *,
        gate: bool = False,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        ls_init_value: float | None = 1e-6,
        norm_eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
        **sgconv: Any,
    ) -> None:
        super().__init__()
        if type(gate) is not bool:
            raise ValueError(f"gate={gate!r} must be True or False")
        if not isinstance(mlp_ratio, int | float) or not 1 <= mlp_ratio * channels < math.inf:
            raise ValueError(f"mlp_ratio={mlp_ratio!r} leaves the MLP no hidden channel; give a number such as 4")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.sgconv = SGConv2d(channels, input_size, **sgconv, **dd)
        self.gate = Gate(channels, eps=norm_eps, **dd) if gate else None
        self.norm = LayerNorm(channels, eps=norm_eps, **dd)
        self.mlp = Mlp(channels, int(mlp_ratio * channels), **dd)
        self.ls_init_value = ls_init_value
        self.gamma = nn.Parameter(torch.empty(channels, **dd)) if ls_init_value is not None else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scale to its initial value; the submodules have their own."""
        if self.gamma is not None and self.ls_init_value is not None:
            nn.init.constant_(self.gamma, self.ls_init_value)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        forget(self)  # of another device or dtype it would only take memory
        return super()._apply(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            fused = fused_forward(self, x)
            if fused is not None:
                return fused(self, x)
        y = self.sgconv(x).permute(0, 2, 3, 1)  # gate, LN and MLP work on (B, H, W, C)
        if self.gate is not None:
            y = self.gate(y, x.permute(0, 2, 3, 1))
        y = self.mlp(self.norm(y))
        if self.gamma is not None:
            y = y * self.gamma
        return self.drop_path(y.permute(0, 3, 1, 2)) + x  # the sum has the layout of its first term
