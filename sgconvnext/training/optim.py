"""Updates and the batches in them, ConvNeXt's learning rate of each, and ConvNeXt's parameter groups."""

import math
import re
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from .config import OptimConfig
from .patterns import factors, first_match, patterns, refuse_unmatched

SAME_GROUPS = "keep which parameters optim.layer_decay, optim.lr_scale and optim.no_weight_decay set apart"


def updates_per_epoch(samples: int, global_batch: int) -> int:
    """floor(samples / global batch), as ConvNeXt counts: no update with fewer images."""
    if samples < global_batch:
        raise ValueError(f"optim.global_batch={global_batch} is more than the {samples} training images; lower it")
    return samples // global_batch


def accumulation_steps(global_batch: int, per_device: int, world_size: int) -> int:
    """Forwards per update: global batch / (batch per device * devices), which must come out whole."""
    steps, rest = divmod(global_batch, per_device * world_size)
    if rest:
        raise ValueError(
            f"optim.global_batch={global_batch} is no multiple of optim.batch_per_device={per_device} times "
            f"{world_size} processes = {per_device * world_size}; change one of them"
        )
    return steps


def learning_rates(optim: OptimConfig, epochs: int, updates_per_epoch: int) -> NDArray[np.float64]:
    """The learning rate of every update: linear warm-up from 0 to lr, both ends included, then half a cosine.

        warm-up update i of w:  lr i / (w - 1)
        cosine  update i of n:  min_lr + (lr - min_lr) (1 + cos(pi i / n)) / 2

    ConvNeXt's schedule (facebookresearch/ConvNeXt utils.py:428) to the last bit; timm's cosine differs by up to 6e-7.
    """
    warmup = optim.warmup_epochs * updates_per_epoch
    cosine = epochs * updates_per_epoch - warmup
    tail = [
        optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * i / cosine)) for i in range(cosine)
    ]
    return np.concatenate([np.linspace(0, optim.lr, warmup), np.array(tail)])


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group the learning rate times its ``lr_scale``, see `param_groups`; as in ConvNeXt, min_lr too."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def create_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """AdamW over ConvNeXt's parameter groups."""
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        eps=optim.eps,
        betas=optim.betas,
        param_group_fn=lambda module: configured_groups(module, optim),
    )


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take AdamW's averages from a checkpoint, but keep the weight decay, betas and factors of this run.

    Raises:
        ValueError: the parameters are grouped in another way.
    """
    taken = {"params", "lr"}  # lr is set before every update anyway
    own = [{key: value for key, value in group.items() if key not in taken} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"the checkpoint's optimiser has other parameter groups ({error}); {SAME_GROUPS}") from error
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


def refuse_other_groups(model: nn.Module, before: OptimConfig, now: OptimConfig) -> None:
    """Refuse knobs that would group the parameters otherwise than the checkpoint's.

    AdamW's averages are stored by the place in the groups. `load_state` sees only how many places there are.

    Args:
        model: whose parameters are grouped.
        before: the knobs of the checkpoint's run.
        now: those of this run.

    Raises:
        ValueError: naming the knobs that group.
    """
    then, here = ([group["params"] for group in configured_groups(model, each)] for each in (before, now))
    if [list(map(id, group)) for group in then] != [list(map(id, group)) for group in here]:
        raise ValueError(
            f"the checkpoint's optimiser has {len(then)} parameter groups, this run would have {len(here)}, or others "
            f"of that number; {SAME_GROUPS}"
        )


def configured_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """`param_groups` by the knobs."""
    return param_groups(model, optim.weight_decay, optim.layer_decay, optim.lr_scale, optim.no_weight_decay)


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, lr_scale: str = "", no_weight_decay: str = ""
) -> list[dict[str, Any]]:
    """Groups by (layer, factor, decayed or not), in the order in which the model names them.

        lr_scale of a group = factor * layer_decay^(number of layers above it)

    With layer_decay = 1 there is one layer. Biases, other one-dimensional parameters, ``model.no_weight_decay()`` and
    what ``no_weight_decay`` matches are not decayed.

    Args:
        model: whose parameters are grouped.
        weight_decay, layer_decay: as the knobs.
        lr_scale: "PATTERN=FACTOR, ..."; the first pattern that matches a name gives its factor, else it is 1.
        no_weight_decay: "PATTERN, ...".

    Raises:
        ValueError: a pattern matches no parameter, or the model has no layers for layer decay.
    """
    scales, spared = factors(lr_scale), patterns(no_weight_decay)
    refuse_unmatched(model, "optim.lr_scale", scales)
    refuse_unmatched(model, "optim.no_weight_decay", spared)
    exempt: set[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    layers = _layer_ids(model) if layer_decay < 1 else defaultdict(int)
    top = max(layers.values(), default=0)
    groups: dict[tuple[int, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith(".bias") and not first_match(name, [*exempt, *spared])
        layer, matched = layers[name], first_match(name, scales)
        factor = scales[matched] if matched else 1.0
        group = groups.setdefault(
            (layer, factor, decayed),
            {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": factor * layer_decay ** (top - layer),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layer_ids(model: nn.Module) -> dict[str, int]:
    """ConvNeXt's layers for layer decay (optim_factory.py:32): stage 3's blocks count three to a layer.

    stem 0; stage 1: 1; stage 2: 2; stage 3, block b: 3 + b // 3; stage 4: n = 3 + ceil(depth3 / 3); head n + 1
    """
    names = [name for name, _ in model.named_parameters()]
    blocks = [int(match[1]) for name in names if (match := re.match(r"stages\.2\.blocks\.(\d+)\.", name))]
    if not blocks or not all(re.match(r"(stem|stages\.[0-3]|norm_pre|head)\.", name) for name in names):
        raise ValueError("optim.layer_decay knows only ConvNeXt's layers (stem, stages.0 to 3, head); use 1 here")
    last = 3 + -(-(max(blocks) + 1) // 3)
    ids = {}
    for name in names:
        part = name.split(".")
        if part[0] == "stem":
            ids[name] = 0
        elif part[0] != "stages":
            ids[name] = last + 1
        elif part[1] == "2":
            ids[name] = 3 + (int(part[3]) // 3 if part[2] == "blocks" else 0)
        else:
            ids[name] = {"0": 1, "1": 2, "3": last}[part[1]]
    return ids
