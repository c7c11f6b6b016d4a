"""Arguments that a model does not have: each is refused with what to do instead."""

import difflib
import inspect
from collections.abc import Collection
from typing import Any

from timm.models import build_model_with_cfg

from ..errors import UnknownArgumentError
from .kernel import KERNEL_DEFAULTS

# Arguments of timm's ConvNeXt, and of other models, that have no meaning here, and why
WITHOUT_MEANING = {
    "scale_dim": "every stage has another d, which follows from num_scales and img_size; use num_scales",
    "kernel_sizes": "every kernel is as long as its map; num_scales and img_size say how many parameters it has",
    "patch_size": "the stem always has 4x4 patches; dims and depths are what can be changed",
    "stem_type": "the stem is always ConvNeXt's patches of 4x4",
    "conv_mlp": "the MLP is always of linear layers, which compute the same as 1x1 convolutions",
    "conv_bias": "SGConv has a bias of its own (bias=True); the stem and the downsampling always have theirs",
    "use_grn": "the MLP is ConvNeXt's, not ConvNeXt-V2's: it has no response norm",
    "act_layer": "the activation is always GELU",
    "norm_layer": "the norm is always LayerNorm",
    "head_norm_first": "the head always pools first, then norms",
    "drop_block_rate": "there is no DropBlock; use drop_path_rate or drop_rate",
    "bn_momentum": "there is no batch norm",
    "bn_eps": "there is no batch norm",
    "dynamic_img_size": "the model always takes any image size from 32x32 up",
    "strict_img_size": "the model always takes any image size from 32x32 up",
}
# Of timm's builder, and of the wrapper that features_only=True asks for
OWN = {"model_cls", "variant", "kwargs", "feature_cfg", "pretrained_filter_fn"}  # which are given here
BUILDER = {*inspect.signature(build_model_with_cfg).parameters, "features_only", "feature_cls", "out_indices"} - OWN
# Of SGConv2d and its kernels, which every stage passes on
SGCONV = ["num_scales", "bidirectional", "backend", "row_gap", "bias", *KERNEL_DEFAULTS]


def refuse_unknown(model: type, name: str, kwargs: dict[str, Any], builder: Collection[str] = ()) -> None:
    """Refuse an argument that the model does not have, in one sentence.

    Args:
        model: its class, whose last parameter (**) stands for the arguments of SGCONV.
        name: of the model, for messages.
        kwargs: its arguments.
        builder: further arguments that are taken, of timm's builder.

    Raises:
        ValueError: naming the argument, its value and the cure; also a TypeError, as Python and timm raise.
    """
    own = [*list(inspect.signature(model).parameters)[:-1], *SGCONV]
    known = [*own, *sorted(builder)]
    for key, value in kwargs.items():
        if key in WITHOUT_MEANING:
            raise UnknownArgumentError(f"{name} has no {key} ({key}={value!r}): {WITHOUT_MEANING[key]}; leave it out")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(own)}"
            raise UnknownArgumentError(f"{name} has no argument {key!r} ({key}={value!r}); {hint}")
    if "out_indices" in kwargs and not kwargs.get("features_only"):
        raise ValueError(f"{name}: out_indices={kwargs['out_indices']!r} is of features_only=True; add it")
