"""How many taps a trained network needs: top-1 against the share of taps that are set to zero."""

import copy
import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import figure
from ..models.kernel import lag_taps
from .subject import Subject

SHARES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
ORDERS = {"smallest": ("the smallest taps go first", "#d95f02"), "random": ("taps go at random", "#777777")}
BATCH = 64


@dataclass(frozen=True)
class Pruned:
    """Top-1 in percent on so many images with so large a share of every kernel's taps set to zero, in that order."""

    order: str
    share: float
    top1: float
    images: int


def prune(kernel: Tensor, share: float, order: str) -> Tensor:
    """A kernel (directions, C, L) with a share of each channel's taps set to zero, rounded down.

    Args:
        kernel: of `SGConv2d.kernel`.
        share: 0 .. 1.
        order: "smallest" magnitude first, or "random".
    """
    rank = kernel.abs() if order == "smallest" else torch.rand(kernel.shape, device=kernel.device)
    lost = rank.argsort(-1)[..., : int(share * kernel.shape[-1])]
    return kernel.scatter(-1, lost, 0.0)


def measure(subject: Subject, count: int) -> list[Pruned]:
    """Evaluate a trained network with more and more of its taps set to zero; the skip D stays.

    Args:
        subject: with the configuration of its run.
        count: validation images, evenly out of all.

    Raises:
        ValueError: an untrained network, or no validation data.
    """
    images, targets = subject.samples(count)
    found = []
    for order in ORDERS:
        torch.manual_seed(0)
        for share in SHARES:
            model = pruned(subject, share, order)
            found.append(Pruned(order, share, top1(model, images, targets), len(images)))
    return found


def pruned(subject: Subject, share: float, order: str) -> nn.Module:
    """A copy of the network, reparameterized, with a share of every kernel's taps set to zero."""
    copied = dataclasses.replace(subject, model=copy.deepcopy(subject.model))
    with torch.no_grad():
        for layer in itertools.chain(*copied.mixers()):
            taps = lag_taps(prune(layer.kernel(), share, order), layer.skip)
            layer.reparameterize()
            layer.taps = taps
    model: nn.Module = copied.model
    return model


def top1(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Accuracy in percent."""
    with torch.inference_mode():
        batches = zip(images.split(BATCH), targets.split(BATCH), strict=True)
        hits = sum(int((model(some).argmax(1) == right).sum()) for some, right in batches)
    return 100 * hits / len(targets)


def draw_pruning(subject: Subject, found: list[Pruned]) -> Any:
    """Top-1 against the share of taps pruned."""
    picture = figure.new(7.2, 4.4)
    axes = picture.subplots()
    for order, (label, colour) in ORDERS.items():
        points = [(100 * point.share, point.top1) for point in found if point.order == order]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=label)
    title = f"{subject.title}: accuracy on {found[0].images} validation images without a part of the taps"
    figure.plain(axes, title, "taps pruned of every kernel, %", "top-1, %")
    axes.legend(frameon=False)
    return picture
