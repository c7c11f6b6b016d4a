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
from .kernel import kernel_of_lags, nearest_weight
from .layer import SGConv2d

if TYPE_CHECKING:
    from .sgconvnext import SGConvNeXt


def convnext_cfgs(arch: str) -> dict[str, Any]:
    """timm's pretrained cfgs of a ConvNeXt by tag, its default first; the weights are converted while they load."""
    found = get_arch_pretrained_cfgs(arch).values()
    return {cfg.tag: dataclasses.replace(cfg, min_input_size=(3, 32, 32)) for cfg in found}


def convert_state(state: Mapping[str, Any], model: "SGConvNeXt", place: str) -> dict[str, Any]:
    """A ConvNeXt's state dict as one of an SGConvNeXt, with the same outputs in evaluation.

    The first d taps of a side go to w_0, the next to w_1. kernel_norm becomes 1: a tap of the 7x7 then is a parameter,
    and an optimiser's step moves it as far as in ConvNeXt. The skip and every other tap are 0.

    Args:
        state: of a ConvNeXt; where its shape is another than the model's, it stays as it is.
        model: built for the image size that the kernels are made for, with row_gap and bias.
        place: what an error begins with.

    Raises:
        ValueError: a variant that the network is not (V2, another stem or norm), or a kernel that the model's do not
            hold.
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
            converted[key] = flat(key, value)
        elif name == "bias":
            converted[f"{path}.sgconv.bias"] = value
    blocks = {path: layer for path, layer in model.named_modules() if isinstance(layer, SGConv2d)}
    for path, layer in blocks.items():
        weight: Any = state.get(path.removesuffix("sgconv") + "conv_dw.weight")
        if weight is not None and weight.shape[0] == layer.channels:
            converted |= {f"{path}.{key}": value for key, value in mixer_state(weight, layer, place).items()}
    return converted


def in_timms_names(state: Mapping[str, Any], model: Any, place: str) -> dict[str, Any]:
    """A ConvNeXt's state dict in timm's names, by timm's own rule."""
    try:
        named: dict[str, Any] = timms_names(dict(state), model)
    except (AttributeError, KeyError, RuntimeError) as error:  # it looks up, and takes over, the shapes of the model
        raise ValueError(f"{place} has the names of a ConvNeXt, but not the shapes of the model ({error})") from error
    return named


def refusal(state: Mapping[str, Any]) -> str:
    """Why a ConvNeXt of another structure has no SGConvNeXt of the same outputs."""
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
    """The weight of a linear layer, where it is of the 1x1 convolution that a model with conv_mlp has."""
    return value[:, :, 0, 0] if ".mlp." in key and value.ndim == 4 else value


def mixer_state(weight: Tensor, layer: SGConv2d, place: str = "conv_dw") -> dict[str, Tensor]:
    """Parameters and norm of the layer that convolves as a depthwise convolution of that weight (C, 1, k, k) does.

    Offsets that no two pixels of the layer's map have are left out.

    Raises:
        ValueError: the layer's taps cannot hold it.
    """
    reach = _reach(weight, layer, place)
    height, width = layer.input_size
    taps = weight.new_zeros(layer.channels, 2 * layer.length - 1)
    for (dy, dx), index in _offsets(layer, reach):
        taps[:, index] = weight[:, 0, dy + reach, dx + reach]
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
    """k // 2 of a weight that the layer can hold."""
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
    """The weight (C, 1, k, k) of the depthwise convolution that a layer's taps are, and what is not in it.

    Returns:
        the weight, and the largest share of a channel's energy (sum of its squared taps) at other offsets.

    Raises:
        ValueError: as of `mixer_state`.
    """
    taps = layer.built_taps().detach()
    weight = taps.new_zeros(layer.channels, 1, size, size)
    reach = _reach(weight, layer, "a convolution of that size")
    for (dy, dx), index in _offsets(layer, reach):
        weight[:, 0, dy + reach, dx + reach] = taps[:, index]
    energy, kept = taps.double().square().sum(1), weight.double().square().sum((1, 2, 3))
    lost = torch.where(energy > 0, (energy - kept) / energy, 0.0)
    return weight, float(lost.max())


def _offsets(layer: SGConv2d, reach: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Every offset (dy, dx) of up to ``reach`` that two pixels of the layer's map have, and the index of its tap."""
    height, width = layer.input_size
    row, length = width + layer.row_gap, layer.length
    for dy in range(-min(reach, height - 1), min(reach, height - 1) + 1):
        for dx in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            yield (dy, dx), length - 1 - dy * row - dx
