"""The ConvNeXt block with SGConv in place of the 7x7 depthwise convolution."""

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from torch import Tensor, nn

from .layer import SGConv2d, infers_eagerly

PIECE = 1024  # tokens whose hidden layer stays in a CPU's cache; measured with widths 96 to 768


class SGConvNeXtBlock(nn.Module):
    """x + DropPath(gamma * Linear(GELU(Linear(LN(SGConv2d(x)))))); (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        input_size: H, W that the kernel is built for.
        drop_path: probability of dropping the branch of a sample.
        ls_init_value: initial layer scale gamma; None for no layer scale.
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
        device: Any = None,
        dtype: Any = None,
        **sgconv: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.sgconv = SGConv2d(channels, input_size, **sgconv, **dd)
        self.norm = LayerNorm(channels, **dd)
        self.mlp = Mlp(channels, 4 * channels, **dd)
        self.ls_init_value = ls_init_value
        self.gamma = nn.Parameter(torch.empty(channels, **dd)) if ls_init_value is not None else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the layer scale to its initial value; the submodules have their own."""
        if self.gamma is not None and self.ls_init_value is not None:
            nn.init.constant_(self.gamma, self.ls_init_value)

    def forward(self, x: Tensor) -> Tensor:
        y = self.sgconv(x).permute(0, 2, 3, 1)  # LN and the MLP work on (B, H, W, C)
        if not torch.jit.is_scripting() and self._works_in_pieces(x):
            return self._in_pieces(x, y)
        y = self.mlp(self.norm(y)).permute(0, 3, 1, 2)
        if self.gamma is not None:
            y = y * self.gamma.reshape(1, -1, 1, 1)
        return (
            self.drop_path(y) + x
        )  # of mixed layouts the first is kept: that which the norm reads fastest

    @torch.jit.unused
    def _works_in_pieces(self, x: Tensor) -> bool:
        """Whether nobody sees that a few tokens at a time go through the MLP: no gradient, and no hook."""
        if not infers_eagerly(x) or self.training or x.shape[0] * x.shape[2] * x.shape[3] <= PIECE:
            return False
        return not any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())

    @torch.jit.unused
    def _in_pieces(self, x: Tensor, y: Tensor) -> Tensor:
        """x + gamma * MLP(LN(y)) with the hidden layer, four times as large as x, in the cache instead of memory."""
        pieces = []
        tokens = x.permute(0, 2, 3, 1).flatten(0, 2).split(PIECE)
        for shortcut, mixed in zip(tokens, y.flatten(0, 2).split(PIECE), strict=True):
            branch = self.mlp(self.norm(mixed))
            pieces.append(shortcut + (branch if self.gamma is None else branch * self.gamma))
        return torch.cat(pieces).unflatten(0, y.shape[:3]).permute(0, 3, 1, 2)
