"""Which backends a run convolves with: measured before its first update, kept in its checkpoints."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..tuning import Tuning, forget
from .engine import Training, autocast

_logger = logging.getLogger(__name__)

Tune = Callable[[nn.Module, Tensor], Tuning]


def settle(t: Training, kept: dict[str, Any] | None, tune: Tune) -> dict[str, Any] | None:
    """With run.tune, let every process convolve with the backends that a checkpoint has, or that rank 0 measures now.

    Args:
        t: the run.
        kept: what this function returned to the run that wrote the checkpoint, so that a resumed run repeats itself.
            What was measured on another kind of device, or for other images, is measured again.
        tune: `sgconvnext.tune`.

    Returns:
        the choices, for the checkpoint; None without run.tune, where the shipped ones hold.

    Raises:
        ValueError: the model has no layer that asks, or no backend is right.
    """
    forget()  # what another run in this process has measured
    if not t.config.run.tune:
        return None
    state = t.world.on_first(lambda: _kept(t, kept) or _measured(t, tune).state())
    tuning = Tuning.of_state(state)
    if not tuning.is_of(t.world.device):
        raise ValueError(f"run.tune needs devices of one kind, but rank 0 has {tuning.facts['device']}; leave it out")
    for choice in tuning.use().choices:
        _logger.info("backend: %s", choice)
    return tuning.state()


def _images(t: Training) -> str:
    """The batch and the size of the images that the choices are for."""
    return "{} x {} x {}".format(t.config.optim.batch_per_device, *to_2tuple(t.config.data.img_size))


def _kept(t: Training, kept: dict[str, Any] | None) -> dict[str, Any] | None:
    """The choices of a checkpoint, if they are for this device and these images."""
    if kept is None:
        return None
    facts = kept["facts"]
    if Tuning.of_state(kept).is_of(t.world.device) and facts.get("images") == _images(t):
        return kept
    _logger.info("the backends were measured on %s for %s images, so again now", facts["device"], facts.get("images"))
    return None


def _measured(t: Training, tune: Tune) -> Tuning:
    """For the training step and for the evaluation of a batch."""
    model, found = t.model, []
    layout = torch.channels_last if t.config.model.channels_last else torch.contiguous_format
    images = torch.zeros(t.config.optim.batch_per_device, 3, *to_2tuple(t.config.data.img_size))
    images = images.to(t.world.device, memory_format=layout)
    before = model.training
    for training in (True, False):
        model.train(training)
        with autocast(t.config, t.world.device):
            found.append(tune(model, images))
    model.train(before)
    return Tuning([choice for each in found for choice in each.choices], found[0].facts | {"images": _images(t)})
