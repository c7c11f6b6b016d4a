"""What a network sees: stage outputs of an image, and the pixels that one output depends on."""

from typing import Any

import torch
from torch import Tensor

from .. import figure
from ..errors import one_line
from .subject import Subject

MAPS = 6  # channels per stage
DECADES = 4


def stage_outputs(subject: Subject, images: Tensor) -> list[Tensor]:
    """Feature maps (B, C_i, H_i, W_i) of the stages.

    Raises:
        ValueError: the network has no such maps.
    """
    if not hasattr(subject.model, "forward_intermediates"):
        raise ValueError(f"{subject.name} has no stage outputs (timm's forward_intermediates)")
    try:
        maps: list[Tensor] = subject.model.forward_intermediates(images, intermediates_only=True)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"{subject.name} on images {tuple(images.shape)}: {one_line(error)}") from error
    return maps


def receptive_field(subject: Subject, images: Tensor) -> Tensor:
    """The effective receptive field (H, W): |d y / d x|, y the sum over channels of the last stage's centre token.

    Summed over the colours and averaged over the images, as in Luo et al., 2016 (arXiv 1701.04128).

    Args:
        subject: the network.
        images: (B, C, H, W).

    Raises:
        ValueError: the network has no stage outputs.
    """
    images = images.clone().requires_grad_()
    last = stage_outputs(subject, images)[-1]
    centre = last[:, :, last.shape[2] // 2, last.shape[3] // 2].sum()
    (gradient,) = torch.autograd.grad(centre, images)
    return gradient.abs().sum(1).mean(0)


def area_holding(field: Tensor, share: float) -> float:
    """The smallest part of the pixels that holds a share of the field's sum."""
    values = field.flatten().double().sort(descending=True).values.cumsum(0)
    return (int((values < share * values[-1]).sum()) + 1) / len(values)


def draw_features(subject: Subject, image: Tensor) -> Any:
    """The image, and per stage the mean of |x| over the channels and those channels that vary most over the map."""
    with torch.no_grad():
        maps = stage_outputs(subject, image)
    picture = figure.new(1.55 * (MAPS + 3), 1.75 * len(maps) + 0.4)
    grid = picture.add_gridspec(len(maps), MAPS + 3)
    shown = picture.add_subplot(grid[:, :2])
    shown.imshow(_displayed(image[0]))
    shown.set_title(f"the image, {image.shape[2]}x{image.shape[3]}", fontsize=9)
    shown.axis("off")
    for stage, (features,) in enumerate(maps):
        varied = features.flatten(1).std(1, correction=0).argsort(descending=True)[:MAPS].tolist()
        size = f"{features.shape[1]}x{features.shape[2]}"
        panels = [(f"stage {stage + 1} ({size}): mean |x|", features.abs().mean(0))]
        panels += [(f"channel {channel}", features[channel]) for channel in varied]
        for column, (title, values) in enumerate(panels):
            cell = picture.add_subplot(grid[stage, column + 2])
            cell.imshow(values, cmap="viridis", interpolation="nearest")
            cell.set_title(title, fontsize=7)
            cell.axis("off")
    picture.suptitle(f"{subject.title}: stage outputs; bright is high, each map on its own scale")
    return picture


def _displayed(image: Tensor) -> Tensor:
    """(H, W, C) between 0 and 1."""
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0)


def draw_receptive_fields(subjects: list[Subject], images: Tensor) -> Any:
    """Side by side, in tenth powers of the strongest pixel."""
    picture = figure.new(4.6 * len(subjects) + 0.8, 5)
    axes = picture.subplots(1, len(subjects), squeeze=False)[0]
    for cell, subject in zip(axes, subjects, strict=True):
        field = receptive_field(subject, images)
        strongest = field.max().clamp(min=torch.finfo(field.dtype).tiny)  # no pixel counts where all weights are zero
        relative = (field / strongest).clamp(min=10.0**-DECADES).log10()
        shown = cell.imshow(relative, cmap="magma", vmin=-DECADES, vmax=0, interpolation="nearest")
        half, most = (100 * area_holding(field, share) for share in (0.5, 0.99))
        cell.set_title(f"{subject.title}\nhalf of it in {half:.2g} % of the image, 99 % in {most:.2g} %", fontsize=10)
        cell.set_xticks([])
        cell.set_yticks([])
    bar = picture.colorbar(shown, ax=list(axes), shrink=0.8, ticks=range(-DECADES, 1))
    bar.ax.set_yticklabels([f"$10^{{{power}}}$" for power in range(-DECADES, 1)])
    bar.set_label("|gradient| over the strongest pixel's")
    picture.suptitle(
        f"Effective receptive field of the last stage's centre, mean of {len(images)} images", fontsize=11
    )
    return picture
