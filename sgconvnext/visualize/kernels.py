"""The kernels: taps by lag, by 2-D offset, and how much of them lies near lag 0."""

import copy
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import figure
from ..models.convnext import energy_outside
from ..models.kernel import lag_taps
from ..models.layer import SGConv2d
from .subject import Subject

BLUE, BAND = "#1f77b4", "#f0f0f0"
COLUMNS = 4  # channels in a picture


def taps(layer: SGConv2d) -> Tensor:
    """K by lag (C, 2L-1), or (C, L) when causal, without the skip connection D."""
    with torch.no_grad():
        return lag_taps(layer.kernel(), torch.zeros_like(layer.skip))


def scale_starts(layer: SGConv2d) -> list[int]:
    """The first lag of every scale: 0, d, 2d, 4d, ... as far as the kernel reaches."""
    scales, scale_dim = layer.weight.shape[1], layer.weight.shape[3]
    starts = [0, *(2**i * scale_dim for i in range(scales - 1))]
    return [start for start in starts if start < layer.length]


def footprint(taps: Tensor, size: tuple[int, int], row_gap: int = 0) -> Tensor:
    """Taps by 2-D offset: F[dy + H-1, dx + W-1] = K[dy (W + g) + dx], for all offsets between pixels of a map.

    Args:
        taps: of one channel (2L-1), or (L) when causal; L = H (W + g).
        size: (H, W).
        row_gap: g.

    Returns:
        F (2H-1, 2W-1); NaN where no lag is.
    """
    height, width = size
    row = width + row_gap
    dy = torch.arange(1 - height, height)[:, None]
    dx = torch.arange(1 - width, width)
    index = dy * row + dx + len(taps) - height * row
    inside = (index >= 0) & (index < len(taps))
    return torch.where(inside, taps[index.clamp(0, len(taps) - 1)], torch.nan)


def energy_kept(taps: Tensor, length: int) -> Tensor:
    """Share of sum K^2 within |lag| < l, for l = 1 .. L, as the mean over the channels; 1 for a kernel of zeros.

    Args:
        taps: (C, 2L-1), or (C, L) when causal.
        length: L.
    """
    squares = taps.double().square()
    first_lag = length - taps.shape[-1]
    lag = torch.arange(first_lag, length).abs()
    by_lag = torch.zeros(len(taps), length, dtype=squares.dtype).index_add_(1, lag, squares)
    total = by_lag.sum(1, keepdim=True)
    return torch.where(total > 0, by_lag.cumsum(1) / total, 1.0).mean(0)


def _mean_energy(layers: list[SGConv2d]) -> Tensor:
    return torch.stack([energy_kept(taps(layer), layer.length) for layer in layers]).mean(0)


def draw_kernels(subject: Subject, block: int) -> Any:
    """One row per stage, some of its channels: taps against the lag, every other scale shaded (Fig. 10)."""
    layers = _layers(subject, block)
    picture = figure.new(13, 2.1 * len(layers) + 0.5)
    axes = picture.subplots(len(layers), COLUMNS, squeeze=False)
    for stage, (layer, row) in enumerate(zip(layers, axes, strict=True)):
        by_lag = taps(layer)
        lags = torch.arange(layer.length - by_lag.shape[-1], layer.length)
        for cell, channel in zip(row, _channels(layer), strict=False):
            _shade_scales(cell, layer)
            cell.plot(lags, by_lag[channel], color=BLUE, linewidth=0.8)
            cell.set_title(f"stage {stage + 1}, channel {channel}", fontsize=9)
            cell.margins(x=0)
            cell.tick_params(labelsize=8)
        row[0].set_ylabel(f"tap\n({_tokens(layer)} tokens)", fontsize=9)
    picture.supxlabel("lag in tokens, row by row; positive: input tokens before the output's", fontsize=9)
    picture.suptitle(f"{subject.title}: kernels of block {block + 1} of every stage; every other scale is shaded")
    return picture


def _tokens(layer: SGConv2d) -> str:
    height, width = layer.input_size
    return f"{height}x({width}+{layer.row_gap})" if layer.row_gap else f"{height}x{width}"


def _layers(subject: Subject, block: int) -> list[SGConv2d]:
    """The layer of that block in every stage."""
    stages = subject.mixers()
    fewest = min(map(len, stages))
    if block >= fewest:
        raise ValueError(f"--block {block + 1}: a stage of {subject.name} has {fewest} block{'s'[: fewest - 1]}")
    return [of_stage[block] for of_stage in stages]


def _channels(layer: SGConv2d) -> list[int]:
    """Evenly out of all."""
    return [layer.channels * (2 * i + 1) // (2 * COLUMNS) for i in range(COLUMNS)]


def _shade_scales(cell: Any, layer: SGConv2d) -> None:
    starts = [*scale_starts(layer), layer.length]
    for begin, end in list(itertools.pairwise(starts))[1::2]:
        cell.axvspan(begin - 0.5, end - 0.5, color=BAND, linewidth=0)
        if layer.bidirectional:  # the first tap of k- is lag -1
            cell.axvspan(-end - 0.5, -begin - 0.5, color=BAND, linewidth=0)


def draw_footprint(subject: Subject, block: int, reach: int | None = None) -> Any:
    """The same channels by 2-D offset, up to ``reach`` rows and columns; None: the whole map.

    Beyond half a row, an offset shares its tap with one of the row above or below. With a gap of g columns, a frame
    shows the (2g+1) x (2g+1) square of offsets that share no tap; for g = 3 a ConvNeXt's kernel.
    """
    layers = _layers(subject, block)
    picture = figure.new(3.1 * COLUMNS, 2.7 * len(layers) + 0.6)
    axes = picture.subplots(len(layers), COLUMNS, squeeze=False)
    for stage, (layer, row) in enumerate(zip(layers, axes, strict=True)):
        by_lag = taps(layer)
        outside = energy_outside(by_lag, layer.input_size, layer.row_gap, reach=layer.row_gap)
        for cell, channel in zip(row, _channels(layer), strict=False):
            shown = _show_footprint(cell, by_lag[channel], layer, reach)
            bar = picture.colorbar(shown, ax=cell, shrink=0.8, format="%.2g")
            bar.set_ticks([bar.vmin, 0, bar.vmax])
            bar.ax.tick_params(labelsize=7)
            title = f"stage {stage + 1}, channel {channel}"
            if layer.row_gap:
                side = 2 * layer.row_gap + 1
                title += f"\n{100 * outside[channel]:.2g} % of its energy outside {side}x{side}"
            cell.set_title(title, fontsize=9)
            cell.tick_params(labelsize=7)
        row[0].set_ylabel("rows below the output", fontsize=9)
    picture.supxlabel("columns to the right of the output", fontsize=9)
    half = "half a row and its gap away. Beyond," if layers[0].row_gap else "half a row away. Beyond, rows wrap:"
    picture.suptitle(
        f"{subject.title}: taps of block {block + 1} by the input's place around the output (colour: its root)\n"
        f"Dashed: {half} pale taps are the other side's again, a row up or down",
        fontsize=11,
    )
    return picture


def _show_footprint(cell: Any, by_lag: Tensor, layer: SGConv2d, reach: int | None) -> Any:
    """Draw the taps of a channel; return the image, whose colours a colour bar explains."""
    from matplotlib.colors import FuncNorm
    from matplotlib.patches import Rectangle

    (height, width), gap = layer.input_size, layer.row_gap
    # a positive lag is an input before the output: turned around, up and left are up and left in the image
    folded = footprint(by_lag, layer.input_size, gap).flip(0, 1)
    top = float(folded.nan_to_num().abs().max()) or 1.0
    norm = FuncNorm((_signed_root, _signed_square), vmin=-top, vmax=top)
    extent = (0.5 - width, width - 0.5, height - 0.5, 0.5 - height)
    shown = cell.imshow(folded, cmap="RdBu_r", norm=norm, extent=extent, interpolation="nearest")
    half = (width + gap) / 2
    if half < width - 0.5:  # with a gap, a narrow map has no such offsets
        for edge, end in ((-half, 0.5 - width), (half, width - 0.5)):
            cell.axvline(edge, color="black", linestyle="--", linewidth=0.8)
            cell.axvspan(edge, end, color="white", alpha=0.55, linewidth=0)
    if gap:
        cell.add_patch(Rectangle((-gap - 0.5, -gap - 0.5), 2 * gap + 1, 2 * gap + 1, fill=False, linewidth=0.6))
    rows, columns = (side - 0.5 if reach is None else min(reach + 0.5, side - 0.5) for side in layer.input_size)
    cell.set(xlim=(-columns, columns), ylim=(rows, -rows))
    cell.locator_params(integer=True)
    return shown


def _signed_root(value: Any) -> Any:
    return np.sign(value) * np.sqrt(np.abs(value))


def _signed_square(value: Any) -> Any:
    return np.sign(value) * np.square(value)


def draw_energy(subject: Subject) -> Any:
    """Energy kept against the length of the kernel, per stage.

    Dashed: at initialisation, if the network's run began there and not with pretrained weights or a checkpoint.
    """
    knobs = subject.config.model if subject.config else None
    anew = knobs is not None and not (knobs.pretrained or knobs.checkpoint)
    picture = figure.new(7.2, 4.6)
    axes = picture.subplots()
    for stage, (layers, colour) in enumerate(zip(subject.mixers(), figure.COLOURS, strict=False)):
        kept, length = _mean_energy(layers), layers[0].length
        share = 100 * torch.arange(1, length + 1) / length
        axes.plot(share, 100 * kept, color=colour, marker="o" if length < 20 else "", markersize=3)
        enough = int((kept < 0.9).sum()) + 1
        text = f"stage {stage + 1}: 90 % within {enough} of {length} lags"
        axes.annotate(text, (0.4, 0.32 - 0.075 * stage), xycoords="axes fraction", color=colour)
        if anew:
            initial = copy.deepcopy(layers)
            for layer in initial:
                layer.reset_parameters()
            axes.plot(share, 100 * _mean_energy(initial), color=colour, linestyle="--", linewidth=0.9)
    dashed = " (dashed: at initialisation)" if anew else ""
    title = f"{subject.title}: mean over channels and blocks{dashed}"
    figure.plain(axes, title, "lags kept on each side, % of the kernel's length", "energy kept, %")
    return picture
