"""The network and the loss that a configuration names; the network is known only by its name in timm."""

import ast
import difflib
import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from .. import fit
from ..errors import one_line
from ..files import expand
from . import checkpoint, origin
from .config import AugmentConfig, Config, from_dict
from .recorded_model import recorded_model

_logger = logging.getLogger(__name__)

REFUSALS = (ArithmeticError, AssertionError, AttributeError, RuntimeError, TypeError, ValueError)  # of arguments
LOCAL = "local-dir:"  # timm's word before the path of a folder


def create_model(config: Config, classes: int, start: bool = True) -> nn.Module:
    """timm's model of that name, on the CPU. Its attribute ``origin`` is that of the weights that it starts from.

    Args:
        config: of the run.
        classes: outputs of the classifier.
        start: load the weights that a new run starts from (model.checkpoint or model.pretrained), if it names any.

    Raises:
        ValueError: an unknown name, an argument that the model refuses, or weights that do not fit.
    """
    arguments = _arguments(config, classes, start)
    model: Any
    if start and config.model.checkpoint:
        model = _started(config, arguments)
    else:
        model = from_timm(config.model.name, arguments, "model.name=")
        overlay = config.model.kwargs.get("pretrained_cfg_overlay", {})
        pretrained = start and config.model.pretrained
        model.origin = origin.of_pretrained(model, config.model.name, overlay) if pretrained else {}
    if config.model.grad_checkpointing:
        model.set_grad_checkpointing()
    if config.model.channels_last:
        model.to(memory_format=torch.channels_last)
    built: nn.Module = model
    return built


def _started(config: Config, arguments: dict[str, Any]) -> Any:
    """The model with the weights of model.checkpoint, resized where they were trained for another image size."""
    knobs, path, wanted = config.model, config.model.checkpoint, arguments.get("img_size")
    state = checkpoint.load(path)
    before, found = recorded_model(state), checkpoint.weights(state, config.model.checkpoint_ema, path)
    # a ConvNeXt's kernels are for every size
    built = before.img_size if before and wanted and not fit.is_convnext(found) else None
    model: Any = from_timm(knobs.name, arguments | ({"img_size": built} if built else {}), "model.name=")
    if before:
        before.refuse_another(model, knobs.name, knobs.kwargs, path, knobs.new_head)
    skip = fit.classifiers(model) if knobs.new_head else ()
    checkpoint.load_weights(model, _converted(found, model, knobs.name, arguments, path), path, skip)
    if built and wanted and to_2tuple(built) != to_2tuple(wanted):
        model.set_input_size(img_size=wanted)
        _logger.info(
            "checkpoint %r was trained for %s px: its weights are resized for %s px (the model's set_input_size); "
            "model.img_size=%s keeps them as they are",
            *(path, _px(built), _px(wanted), _px(built)),
        )
    model.origin = origin.of_checkpoint(state)
    return model


def _converted(
    found: dict[str, torch.Tensor], model: Any, name: str, arguments: dict[str, Any], path: str
) -> dict[str, torch.Tensor]:
    """Weights for the model: a ConvNeXt's for an SGConvNeXt are converted by its checkpoint filter, others stay.

    timm calls the filter only while it builds a model. So a second model is built, with the channels and classes of
    the weights. If the first model has others, the caller refuses the converted weights.
    """
    ours = any(".sgconv." in key for key in model.state_dict())
    if not (ours and fit.is_convnext(found) and all(isinstance(each, torch.Tensor) for each in found.values())):
        return found
    channels, classes = fit.convnext_ends(found)
    image = (channels, *model.pretrained_cfg["input_size"][1:])
    overlay = {"state_dict": found, "num_classes": classes, "input_size": image}
    theirs = {"num_classes": classes, "in_chans": channels, "pretrained": True, "pretrained_cfg_overlay": overlay}
    converted = from_timm(name, arguments | theirs, f"checkpoint {path!r}: model.name=")
    return converted.state_dict()


def _px(size: int | Sequence[int]) -> str:
    """An image size as a knob takes it."""
    height, width = to_2tuple(size)
    return f"{height}" if height == width else f"[{height},{width}]"


def from_timm(name: str, arguments: dict[str, Any], place: str = "model ") -> nn.Module:
    """timm's model of that name, or a ValueError of one line that begins with the place."""
    if name.startswith(LOCAL):
        name = LOCAL + expand(name.removeprefix(LOCAL))
    if ":" not in name and not timm.is_model(name):  # hf-hub: and local-dir: names are for timm to resolve
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ValueError(f"{place}{name!r} is no timm model" + (f"; did you mean {close[0]!r}?" if close else ""))
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except (*REFUSALS, LookupError, OSError) as error:
        raise ValueError(f"{place}{name!r} cannot be built: {one_line(error)}") from error
    return model


def from_spec(spec: str, img_size: tuple[int, int] | None = None) -> nn.Module:
    """A model by name, with arguments of its own after commas: ``sgconvnext_tiny,backend=fft,dims=[8,16,24,32]``.

    Args:
        spec: timm's name, then key=value pairs; values are Python's literals, or else words.
        img_size: height and width to build it for, where it is built for a size; None for its own.

    Raises:
        ValueError: an unknown model, or an argument that it refuses.
    """
    name, arguments = parse_spec(spec)
    if img_size and has_input_size(name):
        arguments = {"img_size": img_size} | arguments
    return from_timm(name, arguments)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a model as `from_spec` takes them.

    Raises:
        ValueError: no key=value, or a value of None.
    """
    name, *pairs = re.split(r",(?![^\[(]*[\])])", spec)  # a comma in brackets does not separate
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not key or not separator:
            raise ValueError(f"model {spec!r}: {pair!r} cannot be read; write key=value,key=value")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
        if arguments[key] is None:
            raise ValueError(f"model {spec!r}: timm passes no None on to a model; leave {key} out")
    return name, arguments


def _arguments(config: Config, classes: int, start: bool) -> dict[str, Any]:
    model = config.model
    arguments: dict[str, Any] = {
        "pretrained": start and model.pretrained,
        "num_classes": classes,
        "drop_rate": model.drop,  # where it is None, timm does not pass it on
        "drop_path_rate": model.drop_path,
    }
    clash = sorted({*arguments, "img_size"} & set(model.kwargs))
    if clash:
        raise ValueError(f"model.kwargs sets {', '.join(clash)}, which has a knob of its own")
    if nulls := [key for key, value in model.kwargs.items() if value is None]:
        raise ValueError(f"model.kwargs has {nulls[0]}=null, which timm passes on to no model; leave it out")
    if has_input_size(model.name):
        arguments["img_size"] = model.img_size or config.data.img_size
    return arguments | model.kwargs


@functools.cache
def has_input_size(name: str) -> bool:
    """Whether a model is built for an image size, and so has timm's set_input_size; a model without memory tells."""
    with torch.device("meta"):
        return timm.is_model(name) and hasattr(from_timm(name, {}), "set_input_size")


def run_config(state: dict[str, Any], path: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run that wrote a checkpoint, with dotted overrides."""
    cure = (
        "it was not written by train.py of SGConvNeXt; to start from its weights, name it as model.checkpoint of a run"
    )
    if missing := {"args", "epoch"} - set(state):
        raise ValueError(f"checkpoint {path!r} lacks {', '.join(sorted(missing))}; {cure}")
    if not isinstance(state["args"], dict):
        raise ValueError(f"checkpoint {path!r} has args of another program ({type(state['args']).__name__}); {cure}")
    config = from_dict(state["args"], path, overrides)
    before = recorded_model(state)
    if before and before.is_convnext_of(config.model.name):
        before.refuse_other_convnext(config.model.kwargs, path)
        config.model.kwargs.pop("conv_mlp", None)  # overrides cannot take it away, and linear layers compute the same
        if to_2tuple(config.model.img_size) == to_2tuple(before.img_size):  # which a ConvNeXt is not built for
            config.model.img_size = config.data.img_size
    return config


def trained_model(state: dict[str, Any], ema: bool, path: str, overrides: Sequence[str] = ()) -> tuple[Any, Config]:
    """The model of a checkpoint with its weights, and the configuration of the run that wrote it.

    Args:
        state: of `checkpoint.load`.
        ema: the average of the weights instead of the last ones.
        path: of the checkpoint, for messages.
        overrides: knobs of the run to change, "section.key=value".
    """
    config = run_config(state, path, overrides)
    if config.model.num_classes is None:
        raise ValueError(f"checkpoint {path!r} has model.num_classes=null; it was not written by train.py")
    found = checkpoint.weights(state, ema, path)
    model = create_model(config, config.model.num_classes, start=False)
    load_trained(model, config, state, found, path)
    return model, config


def load_trained(
    model: nn.Module, config: Config, state: dict[str, Any], found: dict[str, torch.Tensor], path: str
) -> None:
    """Load a run's weights into the model that its configuration, with overrides, makes."""
    before = recorded_model(state)
    if before:
        before.refuse_another(model, config.model.name, config.model.kwargs, path)
    weights = _converted(found, model, config.model.name, _arguments(config, 0, start=False), path)
    checkpoint.load_weights(model, weights, path)


def create_criterion(augment: AugmentConfig) -> nn.Module:
    """Cross-entropy: of mixup's soft targets, which are smoothed already, of smoothed labels, or of plain ones."""
    if augment.mixup > 0 or augment.cutmix > 0:
        return SoftTargetCrossEntropy()
    if augment.smoothing > 0:
        return LabelSmoothingCrossEntropy(augment.smoothing)
    return nn.CrossEntropyLoss()
