"""SGConvNeXt: ConvNeXt's stem, stages and head around SGConv blocks (arXiv 2210.09298, section 4.3.2)."""

import functools
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices  # what every timm model uses; timm exports it nowhere else
from timm.models._input import update_model_input_size  # likewise
from torch import Tensor, fx, nn

from .arguments import BUILDER, refuse_unknown
from .block import SGConvNeXtBlock
from .convnext import convnext_cfgs, convnext_name
from .gate import Gate
from .input_size import MIN_SIZE, STEM_STRIDE, stage_grids
from .kernel import KERNEL_DEFAULTS
from .layer import SGConv2d
from .pretrained import checkpoint_filter_fn, refusing_unreadable, tell_licence
from .stage import SGConvNeXtStage


@fx.wrap
@register_notrace_function
def stem_input(x: Tensor, in_chans: int, min_size: int = MIN_SIZE) -> Tensor:  # TorchScript sees no globals
    """Images as the stem takes them; refuse what no stage can take.

    A function, and public, because FX traces no branch and sees no private name.
    """
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images are {x.shape}; this model takes (B, {in_chans}, H, W)")
    if x.shape[2] < min_size or x.shape[3] < min_size:  # not their minimum, which a symbolic size does not have
        raise ValueError(f"images are {x.shape[2]}x{x.shape[3]} pixels; resize them to at least {min_size}x{min_size}")
    # oneDNN's output then is in the layout of the norm that follows: for 8 images 1.6 ms instead of 8.4
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if x.device.type == "cpu" else x


class SGConvNeXt(nn.Module):
    """ConvNeXt (arXiv 2201.03545) with every 7x7 depthwise convolution replaced by SGConv2d.

    Images (B, in_chans, H, W), H and W at least 32, to logits (B, num_classes). The kernels are built for ``img_size``
    and keep their 2-D offsets at any other size. With row_gap=3 and bias=True, every ConvNeXt of the same shape is one
    setting of the parameters; see `sgconvnext.models.convnext`.

    Args:
        in_chans, num_classes: channels of the images; classes of the head, 0 for features.
        global_pool: timm's pooling name; "" for none.
        output_stride: 8, 16 or 32; below 32 the last stages trade stride for dilation, with the same parameters.
        depths, dims: blocks and width of each of the four stages.
        img_size: H, W (or one int) that the kernels are built for.
        gate: whether every block has a gate on its convolution; see `sgconvnext.models.gate.Gate`.
        mlp_ratio: hidden channels of the MLPs over the width. With a gate, 3.5 has the cost of 4 without one.
        ls_init_value: initial layer scale; None for none.
        head_init_scale: factor on the classifier's initial weights.
        head_hidden_size: width of a hidden layer in the head, as CLIP's large ConvNeXt has; None for none.
        norm_eps: of all norms.
        drop_rate, drop_path_rate: dropout before the classifier; stochastic depth, linearly from 0 to this.
        device, dtype: of the parameters.
        sgconv: num_scales, bidirectional, backend, row_gap and bias, as in SGConv2d, and the options of its kernels.

    Raises:
        ValueError: an image size below 32, an unknown output stride or argument, or an option that SGConv2d refuses.
    """

    kernel_defaults = KERNEL_DEFAULTS

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        img_size: int | tuple[int, int] = 224,
        gate: bool = False,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = 1e-6,
        head_init_scale: float = 1.0,
        head_hidden_size: int | None = None,
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **sgconv: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(SGConvNeXt, type(self).__name__, sgconv)
        if len(depths) != 4 or len(dims) != 4:
            raise ValueError(f"depths={tuple(depths)} and dims={tuple(dims)} must name four stages each")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.drop_rate, self.head_init_scale = drop_rate, head_init_scale

        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], kernel_size=STEM_STRIDE, stride=STEM_STRIDE, **dd),
            LayerNorm2d(dims[0], eps=norm_eps, **dd),
        )
        self.stages = nn.Sequential()
        self.feature_info: list[dict[str, Any]] = []
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        for i, (stride, dilation, reduction) in enumerate(_strides(output_stride)):
            options = {"ls_init_value": ls_init_value, "norm_eps": norm_eps, "gate": gate, "mlp_ratio": mlp_ratio}
            stage = SGConvNeXtStage(
                dims[max(i - 1, 0)],
                dims[i],
                depth=depths[i],
                grid=stage_grids(img_size)[i],
                stride=stride,
                dilation=(1 if dilation <= 2 else 2, dilation),
                drop_path=rates[i],
                **(options | sgconv | dd),
            )
            self.stages.append(stage)
            self.feature_info.append({"num_chs": dims[i], "reduction": reduction, "module": f"stages.{i}"})
        self.head = NormMlpClassifierHead(
            self.num_features,
            num_classes,
            hidden_size=head_hidden_size,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=functools.partial(LayerNorm2d, eps=norm_eps),
            act_layer="gelu",
            **dd,
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise every parameter and buffer anew, also after `to_empty` on the meta device."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and not name.endswith(".gate.linear"):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | SGConv2d | SGConvNeXtBlock | Gate):
                module.reset_parameters()
        if isinstance(self.head.fc, nn.Linear):
            with torch.no_grad():
                self.head.fc.weight.mul_(self.head_init_scale)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns for layer-wise learning rates: by stage if coarse, else by block."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in backward instead of keeping them."""
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def train(self, mode: bool = True) -> Any:
        """As of any module; but a reparameterized network trains no more. Frozen, it stays in evaluation mode.

        So it can be the teacher, or a frozen part, of a module that is trained and calls ``train`` of all its parts.

        Raises:
            ValueError: it is reparameterized, and one of its parameters requires a gradient. Nothing is changed then.
        """
        layers = [module for module in self.modules() if isinstance(module, SGConv2d)]
        if not mode or all(layer.taps is None for layer in layers):
            return super().train(mode)
        if any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(
                f"this {type(self).__name__} is reparameterized; its kernels cannot train; build the model anew and "
                "load the trained weights, or freeze this one with requires_grad_(False)"
            )
        return super().train(False)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Rebuild every kernel for another image size; see `SGConv2d.set_input_size`."""
        stage: Any
        for stage, grid in zip(self.stages, stage_grids(img_size), strict=False):
            for block in stage.blocks:
                block.sgconv.set_input_size(grid)
        update_model_input_size(self, img_size)  # so that what timm saves is built for this size again

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier, and the pooling if named; reset_other also removes the norm before it."""
        self.num_classes = num_classes
        self.head.reset(
            num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **get_device_dtype(self)
        )
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features and the list of stage outputs (B, C_i, H_i, W_i), or the list alone if intermediates_only.

        ``indices`` are the last n stages if an int, those listed, or all if None; with stop_early, later ones do not
        run. ``norm`` changes nothing: ConvNeXt's norm comes after pooling. ``output_fmt`` is "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is unknown; stage outputs are 'NCHW'")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(stem_input(x, self.in_chans))
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last index, and then the head, which fits the last stage only."""
        take, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "", reset_other=True)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last stage's map (B, C, H/32, W/32)."""
        return self.stages(self.stem(stem_input(x, self.in_chans)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map to logits, or to what the classifier sees."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _strides(output_stride: int) -> list[tuple[int, int, int]]:
    """Of each stage: its stride, the dilation that it has for strides that were given up, and its total reduction."""
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride={output_stride} must be 8, 16 or 32")
    strides, reduction, dilation = [(1, 1, STEM_STRIDE)], STEM_STRIDE, 1
    for _ in range(3):
        stride = 2 if reduction < output_stride else 1
        reduction, dilation = reduction * stride, dilation * (2 // stride)
        strides.append((stride, dilation, reduction))
    return strides


# Depths and widths of timm's ConvNeXt of each name
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "atto": {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)},
    "femto": {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384)},
    "pico": {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512)},
    "nano": {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640)},
    "tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
}
# Further ConvNeXt of timm with weights: CLIP's, and the largest
FURTHER: dict[str, dict[str, Any]] = {
    "large_mlp": {**SIZES["large"], "head_hidden_size": 1536},
    "xlarge": {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)},
    "xxlarge": {"depths": (3, 4, 30, 3), "dims": (384, 768, 1536, 3072), "norm_eps": 1e-5},
}
GAP3: dict[str, Any] = {"row_gap": 3, "bias": True}  # with them a kernel can be ConvNeXt's 7x7
GATED: dict[str, Any] = {"gate": True, "mlp_ratio": 3.5}  # W of the gate has as many weights as the MLP loses

# Arguments of every model that is registered with timm
MODELS: dict[str, dict[str, Any]] = {
    **{f"sgconvnext_{size}": dict(shape) for size, shape in SIZES.items()},
    **{f"sgconvnext_{size}_gated": {**shape, **GATED} for size, shape in SIZES.items()},
    **{f"sgconvnext_{size}_gap3": {**shape, **GAP3} for size, shape in (SIZES | FURTHER).items()},
}


# No test_input_size: evaluation is at 224 px unless asked otherwise
NO_WEIGHTS: dict[str, Any] = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "min_input_size": (3, 32, 32),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.0",
    "classifier": "head.fc",
    "license": "apache-2.0",
}
# The _gap3 names have the cfgs, and so the weights, of timm's ConvNeXt
default_cfgs = generate_default_cfgs(
    {name: NO_WEIGHTS for name in MODELS if not name.endswith("_gap3")}
    | {
        f"{name}.{tag}": cfg
        for name in MODELS
        if name.endswith("_gap3")
        for tag, cfg in convnext_cfgs(convnext_name(name)).items()
    }
)


def _build(name: str, pretrained: bool, **kwargs: Any) -> SGConvNeXt:
    refuse_unknown(SGConvNeXt, name, kwargs, BUILDER)
    source = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained:
        if not source.has_weights and not source.state_dict:
            converts = f", or start from ConvNeXt's: {name}_gap3" if f"{name}_gap3" in MODELS else ""
            raise ValueError(
                f"{name}: this model has no pretrained weights; use pretrained=False, or name your own file with "
                f"pretrained_cfg_overlay={{'file': 'PATH', 'num_classes': N}}{converts}"
            )
        tell_licence(source)
    arguments = MODELS[name] | kwargs
    if arguments.get("row_gap"):
        arguments.setdefault("img_size", tuple(source.input_size[1:]))
    with refusing_unreadable(name, source):
        model: SGConvNeXt = build_model_with_cfg(
            SGConvNeXt,
            name,
            pretrained,
            pretrained_filter_fn=functools.partial(checkpoint_filter_fn, strict=kwargs.get("pretrained_strict", True)),
            feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
            **arguments,
        )
    return model


def _register(name: str) -> None:
    """Give timm, and this module, the function that builds the model of that name."""

    def build(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
        return _build(name, pretrained, **kwargs)

    told = {
        "gap3": ", whose rows are 3 columns apart, so that it takes ConvNeXt's weights",
        "gated": ", with a gate on every convolution and narrower MLPs",
    }.get(name.rpartition("_")[2], "")
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"SGConvNeXt with the depths and widths of timm's {convnext_name(name)}{told}."
    globals()[name] = register_model(build)


for _name in MODELS:
    _register(_name)
