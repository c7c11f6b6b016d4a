"""Which backends a run convolves with: measured before its first update, kept in its checkpoints."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..tuning import Tuning
from .engine import Training, autocast

_logger = logging.getLogger(__name__)

Tune = Callable[[nn.Module, Tensor], Tuning]


def settle(t: Training, kept: dict[str, Any] | None, tune: Tune) -> dict[str, Any] | None:
    """Let every process convolve with the backends that a checkpoint has, or that rank 0 measures now.

    Args:
        t: the run.
        kept: what this function returned to the run that wrote the checkpoint, so that a resumed run repeats itself.
        tune: `sgconvnext.tune`.

    Returns:
        the choices, for the checkpoint; None where the shipped ones hold: run.tune=false, or no layer that asks.

    Raises:
        ValueError: run.tune=true, and the model has no layer that asks.
    """
    device, wanted = t.world.device, t.config.run.tune
    if kept is not None and not Tuning.of_state(kept).is_of(device):
        _logger.info("the backends of the checkpoint were measured on %s, not here", kept["facts"]["device"])
        kept = None
    if kept is None and (wanted or (wanted is None and device.type == "cuda" and _asks(t.model))):
        kept = t.world.on_first(lambda: _measured(t, tune).state())
    if kept is None:
        return None
    tuning = Tuning.of_state(kept).use()
    for choice in tuning.choices:
        _logger.info("backend: %s", choice)
    return tuning.state()


def _asks(model: nn.Module) -> bool:
    return any(getattr(module, "backend", None) == "auto" for module in model.modules())


def _measured(t: Training, tune: Tune) -> Tuning:
    """For the training step and for the evaluation of a batch."""
    model = t.model
    layout = torch.channels_last if t.config.model.channels_last else torch.contiguous_format
    images = torch.zeros(t.config.optim.batch_per_device, 3, *to_2tuple(t.config.data.img_size))
    images = images.to(t.world.device, memory_format=layout)
    before, found = model.training, []
    for training in (True, False):
        model.train(training)
        with autocast(t.config, t.world.device):
            found.append(tune(model, images))
    model.train(before)
    return Tuning([choice for each in found for choice in each.choices], found[0].facts)
