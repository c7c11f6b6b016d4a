"""From a configuration to the network and the loss: the network is only a name given to timm."""

import ast
import difflib
import functools
import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from . import checkpoint
from .config import Augment, Config, from_dict
from .errors import one_line
from .paths import expand

LOCAL = "local-dir:"  # timm's word before the path of a folder


def create_model(config: Config, classes: int, start: bool = True) -> nn.Module:
    """timm's model of that name, on the CPU.

    Args:
        config: of the run.
        classes: outputs of the classifier.
        start: load the weights that a new run starts from (model.checkpoint or model.pretrained), if it names any.

    Raises:
        ValueError: an unknown name, an argument that the model refuses, or weights that do not fit.
    """
    model: Any = from_timm(config.model.name, _arguments(config, classes, start), "model.name=")
    if start and config.model.checkpoint:
        path = config.model.checkpoint
        found = checkpoint.weights(checkpoint.load(path), config.model.checkpoint_ema, path)
        checkpoint.load_weights(
            model, found, path, skip=model.default_cfg["classifier"] if config.model.new_head else ""
        )
    if config.model.grad_checkpointing:
        model.set_grad_checkpointing()
    if config.model.channels_last:
        model.to(memory_format=torch.channels_last)
    built: nn.Module = model
    return built


def from_timm(name: str, arguments: dict[str, Any], place: str = "model ") -> nn.Module:
    """timm's model of that name, or a ValueError of one line that begins with the place."""
    if name.startswith(LOCAL):
        name = LOCAL + expand(name.removeprefix(LOCAL))
    if ":" not in name and not timm.is_model(name):  # hf-hub: and local-dir: names are for timm to resolve
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ValueError(f"{place}{name!r} is no timm model" + (f"; did you mean {close[0]!r}?" if close else ""))
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except (ArithmeticError, AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
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
    name, *pairs = re.split(r",(?![^\[(]*[\])])", spec)  # not at commas in brackets
    arguments: dict[str, Any] = {"img_size": img_size} if img_size and has_input_size(name) else {}
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
    return from_timm(name, arguments)


def _arguments(config: Config, classes: int, start: bool) -> dict[str, Any]:
    model = config.model
    arguments: dict[str, Any] = {
        "pretrained": start and model.pretrained,
        "num_classes": classes,
        "drop_rate": model.drop,  # timm passes None on to no model
        "drop_path_rate": model.drop_path,
    }
    clash = sorted({*arguments, "img_size"} & set(model.kwargs))
    if clash:
        raise ValueError(f"model.kwargs sets {', '.join(clash)}, which has a knob of its own")
    if has_input_size(model.name):
        arguments["img_size"] = model.img_size or config.data.img_size
    return arguments | model.kwargs


@functools.cache
def has_input_size(name: str) -> bool:
    """Models built for an image size have timm's set_input_size; looked up on the meta device, without memory."""
    with torch.device("meta"):
        return timm.is_model(name) and hasattr(from_timm(name, {}), "set_input_size")


def run_config(state: dict[str, Any], path: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run that wrote a checkpoint, with dotted overrides."""
    if missing := {"args", "epoch"} - set(state):
        raise ValueError(f"checkpoint {path!r} lacks {', '.join(sorted(missing))}; it was not written by train.py")
    return from_dict(state["args"], path, overrides)


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
    weights = checkpoint.weights(state, ema, path)
    model = create_model(config, config.model.num_classes, start=False)
    checkpoint.load_weights(model, weights, path)
    return model, config


def create_criterion(augment: Augment) -> nn.Module:
    """Cross-entropy: of mixup's soft targets (smoothed there), of smoothed labels, or plain."""
    if augment.mixup > 0 or augment.cutmix > 0:
        return SoftTargetCrossEntropy()
    if augment.smoothing > 0:
        return LabelSmoothingCrossEntropy(augment.smoothing)
    return nn.CrossEntropyLoss()
