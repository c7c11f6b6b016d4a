"""timm's ConvNeXt with the gate of `sgconvnext_NAME_gated`: what a gated SGConvNeXt has to be compared with.

The gate helps a 7x7 convolution too. Only beside this network can one see what the global convolution does.
"""

from typing import Any

from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from .gate import Gate
from .sgconvnext import GATED, NO_WEIGHTS, SIZES


class GatedConvolution(nn.Module):
    """The gated output of a convolution that keeps shapes; (B, C, H, W) to the same."""

    def __init__(self, conv: nn.Conv2d, eps: float) -> None:
        super().__init__()
        self.conv = conv
        self.gate = Gate(conv.out_channels, eps, device=conv.weight.device, dtype=conv.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        return self.gate(y, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GatedConvNeXt(ConvNeXt):  # type: ignore[misc]  # timm has no types
    """timm's ConvNeXt, and its arguments; every depthwise convolution is gated, and the MLPs are as narrow as ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stage: Any
        for stage in self.stages:
            for block in stage.blocks:
                channels, mlp = block.conv_dw.out_channels, block.mlp
                block.conv_dw = GatedConvolution(block.conv_dw, block.norm.eps)
                block.mlp = type(mlp)(
                    channels,
                    int(GATED["mlp_ratio"] * channels),
                    act_layer=type(mlp.act),
                    use_conv=block.use_conv_mlp,
                    device=mlp.fc1.weight.device,
                    dtype=mlp.fc1.weight.dtype,
                )
                for layer in (block.mlp.fc1, block.mlp.fc2):
                    trunc_normal_(layer.weight, std=0.02)
                    nn.init.zeros_(layer.bias)


default_cfgs = generate_default_cfgs({f"convnext_{size}_gated": NO_WEIGHTS for size in SIZES})


def _register(size: str) -> None:
    """Give timm, and this module, the function that builds the gated ConvNeXt of that size."""
    name = f"convnext_{size}_gated"

    def build(pretrained: bool = False, **kwargs: Any) -> GatedConvNeXt:
        options = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
        model: GatedConvNeXt = build_model_with_cfg(
            GatedConvNeXt, name, pretrained, feature_cfg=options, **(SIZES[size] | kwargs)
        )
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"ConvNeXt with the depths and widths of timm's convnext_{size}, and a gate on every convolution."
    globals()[name] = register_model(build)


for _size in SIZES:
    _register(_size)
