"""Sizes, configurations and entry points: importing this module registers SGConvNeXt with timm."""

import difflib
import functools
import inspect
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from .errors import UnknownArgumentError
from .model import SGConvNeXt
from .pretrained import checkpoint_filter_fn

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

# No test_input_size: evaluation is at 224 unless asked otherwise. The url stays empty until weights exist.
default_cfgs = generate_default_cfgs(
    {
        f"sgconvnext_{size}": {
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
        for size in SIZES
    }
)


# Arguments of timm's ConvNeXt, and of others, that there is nothing to apply to
WITHOUT_MEANING = {
    "kernel_sizes": "every kernel is as long as its map; num_scales and img_size say how many parameters it has",
    "patch_size": "the stem always has 4x4 patches; dims and depths are what can be changed",
    "stem_type": "the stem is always ConvNeXt's patches of 4x4",
    "conv_mlp": "the MLP is always of linear layers, which compute the same as 1x1 convolutions",
    "conv_bias": "SGConv has a skip in place of a bias; the stem and the downsampling always have theirs",
    "use_grn": "the MLP is ConvNeXt's, not ConvNeXt-V2's: it has no response norm",
    "act_layer": "the activation is always GELU",
    "norm_layer": "the norm is always LayerNorm",
    "norm_eps": "LayerNorm's eps is always timm's 1e-6",
    "head_norm_first": "the head always pools first, then norms",
    "head_hidden_size": "the head is always one linear layer",
    "drop_block_rate": "there is no DropBlock; use drop_path_rate or drop_rate",
    "bn_momentum": "there is no batch norm",
    "bn_eps": "there is no batch norm",
    "dynamic_img_size": "the model always takes any image size from 32x32 up",
    "strict_img_size": "the model always takes any image size from 32x32 up",
}
# Of timm's builder, and of the wrapper that features_only=True asks for
OWN = {"model_cls", "variant", "kwargs", "feature_cfg", "pretrained_filter_fn"}  # which are given here
BUILDER = {*inspect.signature(build_model_with_cfg).parameters, "features_only", "feature_cls", "out_indices"} - OWN


def _refuse_unknown(name: str, kwargs: dict[str, Any]) -> None:
    """One sentence for an argument that the model does not have."""
    known = [*inspect.signature(SGConvNeXt).parameters, *sorted(BUILDER)]
    for key, value in kwargs.items():
        if key in WITHOUT_MEANING:
            raise UnknownArgumentError(f"{name} has no {key} ({key}={value!r}): {WITHOUT_MEANING[key]}; leave it out")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known[: known.index('device')])}"
            raise UnknownArgumentError(f"{name} has no argument {key!r} ({key}={value!r}); {hint}")
    if "out_indices" in kwargs and not kwargs.get("features_only"):
        raise ValueError(f"{name}: out_indices={kwargs['out_indices']!r} is of features_only=True; add it")


def _build(size: str, pretrained: bool, **kwargs: Any) -> SGConvNeXt:
    name = f"sgconvnext_{size}"
    _refuse_unknown(name, kwargs)
    source = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not source.has_weights and not source.state_dict:
        raise ValueError(
            f"{name}: no pretrained weights exist yet; use pretrained=False, or name your own file with "
            "pretrained_cfg_overlay={'file': 'PATH', 'num_classes': N}"
        )
    model: SGConvNeXt = build_model_with_cfg(
        SGConvNeXt,
        name,
        pretrained,
        pretrained_filter_fn=functools.partial(checkpoint_filter_fn, strict=kwargs.get("pretrained_strict", True)),
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **(SIZES[size] | kwargs),
    )
    return model


@register_model
def sgconvnext_atto(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    """SGConvNeXt with the depths and widths of timm's convnext_atto."""
    return _build("atto", pretrained, **kwargs)


@register_model
def sgconvnext_femto(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    """SGConvNeXt with the depths and widths of timm's convnext_femto."""
    return _build("femto", pretrained, **kwargs)


@register_model
def sgconvnext_pico(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    """SGConvNeXt with the depths and widths of timm's convnext_pico."""
    return _build("pico", pretrained, **kwargs)


@register_model
def sgconvnext_nano(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    """SGConvNeXt with the depths and widths of timm's convnext_nano."""
    return _build("nano", pretrained, **kwargs)


@register_model
def sgconvnext_tiny(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    """SGConvNeXt-T: ConvNeXt-T's depths and widths."""
    return _build("tiny", pretrained, **kwargs)


@register_model
def sgconvnext_small(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    """SGConvNeXt-S: ConvNeXt-S's depths and widths."""
    return _build("small", pretrained, **kwargs)


@register_model
def sgconvnext_base(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    """SGConvNeXt-B: ConvNeXt-B's depths and widths."""
    return _build("base", pretrained, **kwargs)


@register_model
def sgconvnext_large(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    """SGConvNeXt-L: ConvNeXt-L's depths and widths."""
    return _build("large", pretrained, **kwargs)
