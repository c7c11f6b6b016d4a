"""ConvNeXt to SGConvNeXt and back: `from_convnext` and `to_convnext`, checked by running both networks."""

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import NormMlpClassifierHead
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from .. import fit
from ..errors import UnknownArgumentError, one_line
from .arguments import SGCONV
from .convnext import convnext_name, convolution_weight, in_timms_names, refusal
from .input_size import STEM_STRIDE
from .layer import SGConv2d
from .sgconvnext import GAP3, MODELS, SGConvNeXt

_logger = logging.getLogger(__name__)

LARGEST_ERROR = 1e-4  # of the outputs, relative to their size; that of a right conversion is below 1e-6
LOST = 1e-12  # share of a kernel's energy that is rounding
GIVEN = ("model_name", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")  # by the source
SOURCES = ("url", "file", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "architecture", "custom_load")


def from_convnext(source: str | nn.Module | Mapping[str, Tensor], pretrained: bool = False, **kwargs: Any) -> Any:
    """An SGConvNeXt with the outputs of a ConvNeXt, in evaluation mode.

        sgconvnext.from_convnext("convnext_tiny.fb_in1k", pretrained=True)

    Both networks run on one random image before it is returned. The result equals the ConvNeXt at every image size; if
    it is built for less than 128 px, up to that size: offsets that no two pixels of its maps have are not in its
    kernels, and the log says so. timm's pretrained_cfg goes with it: input size, mean, std, crop, labels, licence.

    Args:
        source: timm's name of a ConvNeXt, with or without a tag, "local-dir:FOLDER" or "hf-hub:OWNER/NAME"; a ConvNeXt
            of timm; or the state dict of one.
        pretrained: of a name, as in timm.create_model: load its weights.
        kwargs: further arguments of timm.create_model: those of SGConvNeXt, such as img_size, backend or gate (which
            adds C^2 + C parameters to a block, all 0 at first), and those by which timm adapts the weights, such as
            num_classes, in_chans or features_only.

    Raises:
        ValueError: not a ConvNeXt, or one that SGConvNeXt does not contain; weights that do not fit; or outputs that
            differ by more than 1e-4, relative to their size.
    """
    return convert(convnext(source, pretrained), **kwargs)[0]


def convert(theirs: Any, /, **kwargs: Any) -> tuple[Any, float]:
    """What `from_convnext` returns for a ConvNeXt, and the error of its outputs."""
    for key in GIVEN:
        if key in kwargs:
            raise UnknownArgumentError(f"from_convnext takes no {key} ({key}={kwargs[key]!r}): the source has it")
    adapting = set(kwargs) - {"img_size", "gate", "drop_rate", "drop_path_rate", *SGCONV}
    ours = _converted(theirs, {key: value for key, value in kwargs.items() if key not in adapting})
    error = _checked(theirs, ours)
    _tell_dropped(ours)
    model = _converted(theirs, kwargs) if adapting else ours
    first = next(theirs.parameters())
    place = {"device": kwargs.get("device") or first.device, "dtype": kwargs.get("dtype") or first.dtype}
    return model.to(**place).eval(), error


def to_convnext(model: SGConvNeXt) -> tuple[Any, float]:
    """The ConvNeXt of an SGConvNeXt whose kernels are 0 outside of a 7x7, in evaluation mode, and its outputs' error.

    Raises:
        ValueError: kernels with energy outside, which would be lost, or rows that are less than 3 columns apart.
    """
    if not isinstance(model, SGConvNeXt):
        raise ValueError(f"{name_of(model)} is no SGConvNeXt, but of the class {type(model).__name__}")
    state, lost = dict(model.state_dict()), 0.0
    for path, layer in model.named_modules():
        if isinstance(layer, SGConv2d):
            weight, outside = convolution_weight(layer)
            lost = max(lost, outside)
            block = path.removesuffix("sgconv")
            kept = {key: value for key, value in state.items() if not fit.within(key, path)}
            state = kept | {f"{block}conv_dw.weight": weight, f"{block}conv_dw.bias": state[f"{path}.bias"]}
    gates = [key for key in state if ".gate." in key]
    if any(state[key].any() for key in gates):
        raise ValueError(f"{name_of(model)} has gates, which a ConvNeXt would lose; keep the SGConvNeXt")
    state = {key: value for key, value in state.items() if key not in gates}
    if lost > LOST:
        raise ValueError(
            f"{name_of(model)}: up to {lost:.2%} of a kernel's energy is outside of its 7x7, which a ConvNeXt would "
            "lose; keep the SGConvNeXt"
        )
    config = _config(model)
    name = convnext_name(config_of(model).get("architecture", ""))
    theirs = _of_state(state, name, **_settings(model))
    theirs.pretrained_cfg |= config | {"num_classes": model.num_classes}
    return theirs.eval(), _checked(model, theirs)


def config_of(model: Any) -> dict[str, Any]:
    """timm's pretrained_cfg of a model."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return config


def name_of(model: Any) -> str:
    """Architecture and tag of a model of timm."""
    config = config_of(model)
    tag = f".{config['tag']}" if config.get("tag") else ""
    return f"{config.get('architecture') or type(model).__name__}{tag}"


def convnext(source: Any, pretrained: bool = False) -> Any:
    """timm's ConvNeXt of a source, with its weights."""
    if isinstance(source, str):
        if ":" not in source and not timm.is_model(source):
            raise ValueError(f"{source!r} is no timm model; name a ConvNeXt, such as 'convnext_tiny.fb_in1k'")
        try:
            model: Any = timm.create_model(source, pretrained=pretrained)
        except (OSError, RuntimeError) as error:  # no such file, no network, or no weights of that name
            raise ValueError(f"{source!r} cannot be loaded: {one_line(error)}") from error
    elif isinstance(source, nn.Module):
        model = source
    elif isinstance(source, Mapping):
        model = _of_state(dict(source))
    else:
        raise ValueError(f"{source!r:.60} is no ConvNeXt; give timm's name of one, a model or a state dict")
    if type(model) is not ConvNeXt:
        raise ValueError(
            f"{name_of(model)} is no ConvNeXt of timm, but of the class {type(model).__name__}; if it wraps one, give "
            "that one"
        )
    if told := refusal(model.state_dict()):
        raise ValueError(f"{name_of(model)} {told}")
    if len(model.stages) != 4 or not _is_timms(model.head):
        raise ValueError(
            f"{name_of(model)} is pruned, or has another head than timm's; convert a ConvNeXt as timm builds it, then "
            "prune it or replace its head"
        )
    probe = torch.linspace(-3, 3, 61)
    if not all(torch.equal(block.mlp.act(probe), F.gelu(probe)) for stage in model.stages for block in stage.blocks):
        raise ValueError(f"{name_of(model)} has another activation than GELU; no SGConvNeXt computes the same")
    return model


def _is_timms(head: Any) -> bool:
    """Whether it has timm's layers: pooling, norm, and a linear layer or a 1x1 convolution, or none."""
    whole = isinstance(head, NormMlpClassifierHead) and not isinstance(head.norm, nn.Identity)
    return whole and isinstance(head.fc, nn.Linear | nn.Conv2d | nn.Identity)


def _of_state(state: dict[str, Any], arch: str = "", **settings: Any) -> Any:
    """timm's ConvNeXt with the weights of a state dict."""
    place = "the state dict"
    state = dict(state["model"]) if isinstance(state.get("model"), Mapping) else state
    if state and (told := fit.no_tensors(state)):
        raise ValueError(f"{place} {told}")
    blocks = {}
    for key, value in state.items():
        match = re.search(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(?:conv_dw|dwconv)\.weight$", key)
        if match and value.ndim == 4:
            blocks[int(match[1]), int(match[2])] = value.shape[0]
    if any(".sgconv." in str(key) for key in state):
        raise ValueError(
            f"{place} is of an SGConvNeXt; name its folder (local-dir:FOLDER) or a checkpoint of train.py"
        )
    if not blocks:
        told = refusal(state) or "is not of a ConvNeXt: it has no depthwise convolutions (conv_dw)"
        raise ValueError(f"{place} {told}")
    depths = [sum(stage == i for stage, _ in blocks) for i in range(4)]
    shape = {"depths": tuple(depths), "dims": tuple(blocks.get((i, 0), 0) for i in range(4)), "conv_mlp": False}
    if 0 in depths:
        raise ValueError(f"{place} has blocks {depths} in its stages; a ConvNeXt has some in each of four")
    unnamed = timm.create_model("convnext_tiny", **shape, num_classes=0, device="meta")
    named = in_timms_names(state, unnamed, place)
    if told := refusal(named):
        raise ValueError(f"{place} {told}")
    if "stem.0.weight" not in named:  # such as with "module." before each key
        fit.refuse_misfit(unnamed, state, place, ["head.fc"])
    state = named
    shown = shape | _ends(state)
    name = convnext_name(_model_name(shown, arch))
    model = timm.create_model(name, **(shown | settings))
    fit.refuse_misfit(model, state, place)
    model.load_state_dict(state)
    model.pretrained_cfg |= {"tag": None, "license": None}  # nobody knows whose weights they are
    return model


def _ends(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Channels of the images, classes and hidden layer of the head, as weights in timm's names show them."""
    ends: dict[str, Any] = dict(zip(("in_chans", "num_classes"), fit.convnext_ends(state), strict=True))
    hidden = len(state.get("head.pre_logits.fc.weight", ()))
    return ends | ({"head_hidden_size": hidden} if hidden else {})


def _model_name(shown: Mapping[str, Any], arch: str = "") -> str:
    """The model of ours with that shape; if there is none, the one of the same name, or Tiny."""
    keys = ("depths", "dims", "head_hidden_size")
    wanted = [shown.get(key) for key in keys]
    found = [name for name, own in MODELS.items() if "row_gap" in own and [own.get(key) for key in keys] == wanted]
    named = f"sg{arch}_gap3"
    return named if named in found else found[0] if found else named if named in MODELS else "sgconvnext_tiny_gap3"


def _config(model: Any) -> dict[str, Any]:
    """The pretrained_cfg of a model, without the places that its weights came from."""
    return {key: value for key, value in config_of(model).items() if key not in SOURCES}


def arguments(theirs: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments, other than those of that name, of the SGConvNeXt that a ConvNeXt becomes."""
    state = theirs.state_dict()
    depths, dims = fit.stages({key: value.shape for key, value in state.items()})
    shown = {"depths": tuple(depths), "dims": tuple(dims)} | _ends(state)
    name = _model_name(shown, config_of(theirs).get("architecture", ""))
    shown |= _settings(theirs)
    own = {"in_chans": 3, "norm_eps": 1e-6, "output_stride": 32, "global_pool": "avg", "drop_rate": 0.0} | MODELS[name]
    own |= {"drop_path_rate": 0.0, "num_classes": _ends(state)["num_classes"]}  # of the pretrained_cfg
    return name, {key: value for key, value in shown.items() if own.get(key) != value}


def _settings(model: Any) -> dict[str, Any]:
    """Arguments of a ConvNeXt, and of ours, that its weights do not show."""
    return {
        "norm_eps": model.stem[-1].eps,
        "output_stride": model.feature_info[-1]["reduction"],
        "global_pool": model.head.global_pool.pool_type,
        "drop_rate": model.drop_rate,
        "drop_path_rate": getattr(model.stages[-1].blocks[-1].drop_path, "drop_prob", 0.0),
    }


def _converted(theirs: Any, kwargs: dict[str, Any]) -> Any:
    """The SGConvNeXt of a ConvNeXt: by timm, which calls our filter of checkpoints and adapts what kwargs ask for."""
    name, own = arguments(theirs)
    config = _config(theirs)
    size = config.get("input_size", (3, 224, 224))
    channels = theirs.stem[0].in_channels
    state = theirs.state_dict()
    config |= {"num_classes": _ends(state)["num_classes"], "input_size": (channels, *size[1:]), "state_dict": state}
    model = timm.create_model(name, pretrained=True, pretrained_cfg=config, **(own | kwargs))
    model.pretrained_cfg.pop("state_dict", None)
    return model


def _checked(before: Any, after: Any) -> float:
    """The relative error of features and outputs on one random image; a large one is refused."""
    sides = [STEM_STRIDE * side for each in (before, after) if isinstance(each, SGConvNeXt) for side in _map(each)]
    image = torch.randn(1, before.stem[0].in_channels, *sides, generator=torch.Generator().manual_seed(0))
    outputs = []
    for model in (before, after):
        first = next(model.parameters())
        evaluating = not any(module.training for module in model.modules())
        plain = (first.dtype, first.device.type) == (torch.float32, "cpu") and evaluating
        model = model if plain else copy.deepcopy(model).to("cpu", torch.float32).eval()
        with torch.no_grad():
            features = model.forward_features(image)
            outputs.append((features, model.forward_head(features)))
    errors = [(a - b).norm() / a.norm().clamp_min(1e-30) for a, b in zip(*outputs, strict=True)]
    error = float(torch.stack(errors).max())  # NaN stays NaN
    if not error <= LARGEST_ERROR:
        raise ValueError(
            f"{name_of(before)}: the converted network's outputs differ by {error:.1e}, more than {LARGEST_ERROR:g}; "
            "if it was changed after timm built it (hooks, padding, a norm's eps), undo that; if not, please report it"
        )
    _logger.info("%s became %s; its outputs differ by %.1e", name_of(before), name_of(after), error)
    return error


def _map(model: Any) -> tuple[int, int]:
    size: tuple[int, int] = model.stages[0].blocks[0].sgconv.input_size
    return size


def _tell_dropped(model: Any) -> None:
    """Warn of kernels that are built for maps on which a 7x7 does not fit."""
    reach = GAP3["row_gap"]
    small = {
        layer.input_size for layer in model.modules() if isinstance(layer, SGConv2d) if min(layer.input_size) <= reach
    }
    if small:
        maps = ", ".join("{}x{}".format(*size) for size in sorted(small))
        height, width = (STEM_STRIDE * side for side in _map(model))
        _logger.warning(
            "%s is built for %dx%d px, so its kernels lack what does not fit on maps of %s: it is the ConvNeXt up to "
            "that size only; img_size=128 or more keeps all",
            *(name_of(model), height, width, maps),
        )
