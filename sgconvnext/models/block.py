"""The ConvNeXt block with SGConv in place of the 7x7 depthwise convolution."""

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from torch import Tensor, nn

from .fused import fused_forward
from .kept import forget
from .layer import SGConv2d


class SGConvNeXtBlock(nn.Module):
    """x + DropPath(gamma * Linear(GELU(Linear(LN(SGConv2d(x)))))); (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        input_size: H, W that the kernel is built for.
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
        drop_path: float = 0.0,
        ls_init_value: float | None = 1e-6,
        norm_eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
        **sgconv: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.sgconv = SGConv2d(channels, input_size, **sgconv, **dd)
        self.norm = LayerNorm(channels, eps=norm_eps, **dd)
        self.mlp = Mlp(channels, 4 * channels, **dd)
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
        y = self.sgconv(x).permute(0, 2, 3, 1)  # LN and the MLP work on (B, H, W, C)
        y = self.mlp(self.norm(y))
        if self.gamma is not None:
            y = y * self.gamma
        return self.drop_path(y.permute(0, 3, 1, 2)) + x  # the sum has the layout of its first term
