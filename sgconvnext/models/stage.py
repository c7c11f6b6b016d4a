"""A stage of the network: downsampling, then blocks."""

from typing import Any

import torch
from timm.layers import LayerNorm2d, create_conv2d
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .block import SGConvNeXtBlock
from .fused import fused_chain


class SGConvNeXtStage(nn.Module):
    """Downsampling (LN, then a 2x2 convolution) where size or width changes, then ``depth`` blocks.

    Args:
        in_chans, channels: width before and inside the stage.
        depth: number of blocks.
        grid: H, W that the blocks' kernels are built for.
        stride: 1 or 2, of the downsampling convolution.
        dilation: (of the downsampling convolution, of the blocks); not 1 only where stride was traded for dilation.
        drop_path: one probability per block.
        norm_eps: of all norms.
        device, dtype: of the parameters.
        block: further options of SGConvNeXtBlock.
    """

    def __init__(
        self,
        in_chans: int,
        channels: int,
        *,
        depth: int,
        grid: tuple[int, int],
        stride: int,
        dilation: tuple[int, int],
        drop_path: list[float],
        norm_eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
        **block: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        downsample: nn.Module = nn.Identity()
        if in_chans != channels or stride > 1 or dilation[0] != dilation[1]:
            kernel_size = 2 if stride > 1 or dilation[0] != dilation[1] else 1
            padding = "same" if dilation[1] > 1 else 0
            conv = create_conv2d(
                in_chans, channels, kernel_size, stride=stride, dilation=dilation[0], padding=padding, bias=True, **dd
            )
            downsample = nn.Sequential(LayerNorm2d(in_chans, eps=norm_eps, **dd), conv)
        self.downsample = downsample
        self.blocks = nn.Sequential(
            *(
                SGConvNeXtBlock(
                    channels, grid, drop_path=drop_path[i], norm_eps=norm_eps, dilation=dilation[1], **block, **dd
                )
                for i in range(depth)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if not torch.jit.is_scripting():
            if self.grad_checkpointing:
                return checkpoint_seq(self.blocks, x)
            if all(type(block) is SGConvNeXtBlock for block in self.blocks):
                fused = fused_chain(self.blocks, x)
                if fused is not None:
                    return fused(self.blocks, x)
        return self.blocks(x)
