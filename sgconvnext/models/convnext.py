"""ConvNeXt as one setting of SGConvNeXt: its 7x7 depthwise convolutions as taps, its checkpoints, its timm cfgs.

A k x k depthwise convolution with zero padding (torch's cross-correlation) of rows that are g >= k // 2 columns apart:

    K[-(dy (W + g) + dx)] = weight[dy + k // 2, dx + k // 2],   |dy|, |dx| <= k // 2;   K = 0 at every other lag

No offset then wraps into another row, so both give the same sums. Everything else of the two networks is the same.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from timm.models import get_arch_pretrained_cfgs
from timm.models.convnext import checkpoint_filter_fn as timms_names
from torch import Tensor

from .. import fit
from .gate import Gate
from .kernel import kernel_of_lags, nearest_weight
from .layer import SGConv2d

if TYPE_CHECKING:
    from .sgconvnext import SGConvNeXt


def convnext_name(name: str) -> str:
    """timm's ConvNeXt of the same shape as our model of that name: sgconvnext_tiny_gap3 to convnext_tiny."""
    return name.removeprefix("sg").removesuffix("_gap3").removesuffix("_gated")


def convnext_cfgs(arch: str) -> dict[str, Any]:
    """timm's pretrained cfgs of a ConvNeXt by tag, its default first; the weights are converted while they load."""
    found = get_arch_pretrained_cfgs(arch).values()
    return {cfg.tag: dataclasses.replace(cfg, min_input_size=(3, 32, 32)) for cfg in found}


def convert_state(state: Mapping[str, Any], model: "SGConvNeXt", place: str) -> dict[str, Any]:
    """A ConvNeXt's state dict as one of an SGConvNeXt, with the same outputs in evaluation.

    The first d taps of a side go to w_0, the next d to w_1. kernel_norm becomes 1: a parameter of w_0 then is a tap of
    the 7x7, and an optimiser's step moves it as far as in ConvNeXt. The skip, every other tap and the gates are 0.

    Args:
        state: of a ConvNeXt, in the names that `in_timms_names` takes.
        model: built for the image size that the kernels are made for, with row_gap and bias.
        place: what an error begins with.

    Raises:
        ValueError: a ConvNeXt of another structure (V2, another stem or norm), of other depths or widths, or with
            kernels that the model's cannot hold.
    """
    if told := fit.no_tensors(state):
        raise ValueError(f"{place} {told}")
    state = in_timms_names(state, model, place)
    shapes = [{key: value.shape for key, value in each.items()} for each in (model.state_dict(), state)]
    if told := refusal(state) or fit.other_size(model, *shapes):
        raise ValueError(f"{place} {told}")
    converted = {}
    for key, value in state.items():
        path, _, name = key.rpartition(".conv_dw.")
        if not path:
            converted[key] = value
        elif name == "bias":
            converted[f"{path}.sgconv.bias"] = value
    blocks = {path: layer for path, layer in model.named_modules() if isinstance(layer, SGConv2d)}
    for path, layer in blocks.items():
        weight: Any = state.get(path.removesuffix("sgconv") + "conv_dw.weight")
        if weight is not None and weight.shape[0] == layer.channels:
            converted |= {f"{path}.{key}": value for key, value in mixer_state(weight, layer, place).items()}
    for path, gate in model.named_modules():
        if isinstance(gate, Gate):
            converted |= {f"{path}.{key}": torch.zeros(value.shape) for key, value in gate.state_dict().items()}
    return converted


def in_timms_names(state: Mapping[str, Any], model: Any, place: str) -> dict[str, Any]:
    """A ConvNeXt's state dict in timm's names, by timm's own rule, and with linear layers in its MLPs.

    Args:
        state: of a ConvNeXt, in timm's names, in those of its authors, or within a CLIP model.
        model: from which timm takes shapes.
        place: what an error begins with.

    Raises:
        ValueError: the shapes of the state are not those of the model.
    """
    try:
        named: dict[str, Any] = timms_names(dict(state), model)
    except (AttributeError, KeyError, RuntimeError) as error:  # it looks up, and takes over, the shapes of the model
        raise ValueError(f"{place} has the names of a ConvNeXt, but not the shapes of the model ({error})") from error
    return {key: flat(key, value) for key, value in named.items()}


def refusal(state: Mapping[str, Any]) -> str:
    """Why no SGConvNeXt has the outputs of the ConvNeXt with that state dict; empty if one has."""
    if any(".conv_dw.gate." in key for key in state):
        return "is of a gated ConvNeXt, whose weights no SGConvNeXt takes; name a ConvNeXt without gates"
    stem: Any = state.get("stem.0.weight")
    for found, what in (
        (any(".grn." in key for key in state), "is of a ConvNeXt-V2, whose MLP has a response norm (GRN)"),
        (stem is not None and stem.shape[2:] != (4, 4), "has another stem than patches of 4x4"),
        ("stem.1.weight" in state and "stem.1.bias" not in state, "has norms without a bias, such as RMS norms"),
        ("stem.1.running_mean" in state, "has batch norms"),
        (
            any(key.endswith(".conv_dw.weight") and key.removesuffix("weight") + "bias" not in state for key in state),
            "has depthwise convolutions without a bias",
        ),
        ("norm_pre.weight" in state, "has its last norm before the pooling (head_norm_first)"),
    ):
        if found:
            return f"{what}: no SGConvNeXt computes the same; name a ConvNeXt of timm's convnext_atto to _xxlarge"
    return ""


def flat(key: str, value: Tensor) -> Tensor:
    """The value, or the weight (out, in) of a linear layer for that (out, in, 1, 1) of a 1x1 convolution in an MLP."""
    return value[:, :, 0, 0] if ".mlp." in key and value.ndim == 4 else value


def mixer_state(weight: Tensor, layer: SGConv2d, place: str = "conv_dw") -> dict[str, Tensor]:
    """State of a layer, but for the bias, with which it is the k x k depthwise convolution of a weight.

    Offsets that no two pixels of the layer's map have are left out.

    Args:
        weight: (C, 1, k, k), k odd.
        layer: whose shapes and options count, not its values.
        place: what an error begins with.

    Returns:
        weight, skip and kernel_norm.

    Raises:
        ValueError: the layer's taps cannot hold the convolution.
    """
    reach = _reach(weight, layer, place)
    height, width = layer.input_size
    taps = weight.new_zeros(layer.channels, 2 * layer.length - 1)
    for dy, dx, lag in _square(layer.input_size, layer.row_gap, reach):
        taps[:, layer.length - 1 + lag] = weight[:, 0, dy + reach, dx + reach]
    kernel = kernel_of_lags(taps, bidirectional=True)
    _, num_scales, _, scale_dim = layer.weight.shape
    if kernel[..., 2 * scale_dim :].any():
        raise ValueError(
            f"{place} has {2 * reach + 1}x{2 * reach + 1} kernels, and the model too few taps at full resolution for "
            f"them (2 x {scale_dim}, on a map of {height}x{width}); leave num_scales={num_scales} out"
        )
    dtype = layer.weight.dtype
    return {
        "weight": nearest_weight(kernel, num_scales, scale_dim, layer.options).to(dtype),
        "skip": torch.zeros_like(layer.skip),
        "kernel_norm": torch.ones_like(layer.kernel_norm),
    }


def _reach(weight: Tensor, layer: SGConv2d, place: str) -> int:
    """k // 2 of a weight (C, 1, k, k); refused where the layer's rows, bias or directions cannot hold it."""
    size = tuple(weight.shape[2:])
    if weight.ndim != 4 or weight.shape[1] != 1 or size[0] != size[1] or size[0] % 2 == 0:
        raise ValueError(f"{place} has a kernel of {tuple(weight.shape)}, which is no depthwise one of odd size")
    for holds, what, cure in (
        (layer.row_gap >= size[0] // 2, f"row_gap={layer.row_gap}", f"row_gap={size[0] // 2}"),
        (layer.bias is not None, "no bias", "bias=True"),
        (layer.bidirectional, "causal kernels", "bidirectional=True"),
    ):
        if not holds:
            raise ValueError(
                f"{place} is of a ConvNeXt, and the model has {what}, so it cannot hold {size[0]}x{size[0]} kernels; "
                f"name a _gap3 model, or build it with {cure}"
            )
    return size[0] // 2


def convolution_weight(layer: SGConv2d, size: int = 7) -> tuple[Tensor, float]:
    """The k x k depthwise convolution in a layer's taps, and how much of the taps is not in it.

    Returns:
        its weight (C, 1, k, k), and the largest `energy_outside` of a channel.

    Raises:
        ValueError: as of `mixer_state`.
    """
    taps = layer.built_taps().detach()
    weight = taps.new_zeros(layer.channels, 1, size, size)
    reach = _reach(weight, layer, "a convolution of that size")
    for dy, dx, lag in _square(layer.input_size, layer.row_gap, reach):
        weight[:, 0, dy + reach, dx + reach] = taps[:, layer.length - 1 + lag]
    return weight, float(energy_outside(taps, layer.input_size, layer.row_gap, reach).max())


def energy_outside(taps: Tensor, size: tuple[int, int], row_gap: int, reach: int) -> Tensor:
    """Share of sum K^2 outside the square of offsets |dy|, |dx| <= reach; 0 for a kernel of zeros.

    Args:
        taps: (C, 2L-1), or (C, L) when causal; L = H (W + g).
        size: (H, W) of the map that they are for.
        row_gap: g, at least ``reach``.
        reach: rows and columns on each side of the output.

    Returns:
        share of each channel (C), in float64.
    """
    first_lag = size[0] * (size[1] + row_gap) - taps.shape[1]
    index = [lag - first_lag for _, _, lag in _square(size, row_gap, reach) if lag >= first_lag]
    squares = taps.double().square()
    outside = squares.index_fill(1, torch.tensor(index, device=taps.device), 0.0).sum(1)
    energy = squares.sum(1)
    return torch.where(energy > 0, outside / energy, 0.0)


def _square(size: tuple[int, int], row_gap: int, reach: int) -> Iterator[tuple[int, int, int]]:
    """dy, dx and lag of every offset |dy|, |dx| <= reach that two pixels of a map (H, W) have."""
    rows, columns = (min(reach, side - 1) for side in size)
    for dy in range(-rows, rows + 1):
        for dx in range(-columns, columns + 1):
            yield dy, dx, -(dy * (size[1] + row_gap) + dx)
