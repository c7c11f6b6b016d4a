"""From a configuration to the network and the loss: the network is only a name given to timm."""

import difflib
import functools
from typing import Any

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from . import checkpoint
from .config import Augment, Config
from .errors import one_line


def create_model(config: Config, classes: int, start: bool = True) -> nn.Module:
    """timm's model of that name, on the CPU.

    Args:
        config: of the run.
        classes: outputs of the classifier.
        start: load the weights that a new run starts from (model.checkpoint or model.pretrained), if it names any.

    Raises:
        ValueError: an unknown name, an argument that the model refuses, or weights that do not fit.
    """
    name = config.model.name
    if ":" not in name and not timm.is_model(name):  # hf-hub: and local-dir: names are for timm to resolve
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ValueError(f"model.name={name!r} is no timm model" + (f"; did you mean {close[0]!r}?" if close else ""))
    try:
        model: Any = timm.create_model(name, **_arguments(config, classes, start))
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise ValueError(f"model.name={name!r} cannot be built: {one_line(error)}") from error
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
    if _has_input_size(model.name):
        arguments["img_size"] = model.img_size or config.data.img_size
    return arguments | model.kwargs


@functools.cache
def _has_input_size(name: str) -> bool:
    """Models built for an image size have timm's set_input_size; looked up on the meta device, without memory."""
    with torch.device("meta"):
        return ":" not in name and hasattr(timm.create_model(name), "set_input_size")


def create_criterion(augment: Augment) -> nn.Module:
    """Cross-entropy: of mixup's soft targets (smoothed there), of smoothed labels, or plain."""
    if augment.mixup > 0 or augment.cutmix > 0:
        return SoftTargetCrossEntropy()
    if augment.smoothing > 0:
        return LabelSmoothingCrossEntropy(augment.smoothing)
    return nn.CrossEntropyLoss()
