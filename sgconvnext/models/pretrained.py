"""Weights on their way into a model that timm builds: a ConvNeXt's are converted, ours resized, and all checked."""

import contextlib
import logging
import math
import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import one_line
from ..fit import is_convnext, refuse_misfit
from .convnext import convert_state
from .input_size import MIN_SIZE, STEM_STRIDE
from .kernel import DECAYS, kernel_options
from .layer import SGConv2d

if TYPE_CHECKING:
    from .sgconvnext import SGConvNeXt

_logger = logging.getLogger(__name__)

FREE = ("apache-2.0", "mit")  # licences that ask for no more than their own text

Grids = list[tuple[int, int]]  # H, W of the stages' maps, for which the kernels are built
Scales = dict[int, tuple[int, int]]  # N and d of each stage


def checkpoint_filter_fn(state_dict: dict[str, Any], model: "SGConvNeXt", strict: bool = True) -> dict[str, Any]:
    """timm's hook between a file and the model: a ConvNeXt's weights are converted, ours resized for its ``img_size``.

    Resizing gives what loading into a model of the built size and then `SGConvNeXt.set_input_size` would. Unless
    ``strict``, keys may be missing, or too many.

    Raises:
        ValueError: the weights are of another model, or it cannot be known for which size they were built.
    """
    config: Any = model.pretrained_cfg
    name, classes = config["architecture"], config["num_classes"]
    place = f"{name}: the pretrained file"
    if isinstance(state_dict.get("model"), dict):  # ConvNeXt's own files
        state_dict = state_dict["model"]
    converts = is_convnext(state_dict)
    if converts:
        state_dict = convert_state(state_dict, model, place)
    theirs = getattr(state_dict.get("head.fc.weight"), "shape", [classes])[0]
    if model.num_classes and theirs != classes:  # else timm drops the trained classifier, and tells nobody
        raise ValueError(
            f"{name}: the weights have a classifier of {theirs} classes, their pretrained_cfg says {classes}; add "
            f"'num_classes': {theirs} to pretrained_cfg_overlay"
        )
    if not converts:
        _refuse_another_kernel(model, name)
        state_dict = _resized(state_dict, model)
    changing = ["head.fc"] if model.num_classes != classes else []  # timm leaves it out, and converts the stem
    if model.in_chans != config["input_size"][0]:
        changing.append("stem.0.weight")
    if strict:
        refuse_misfit(model, state_dict, place, changing)
    return state_dict


def tell_licence(source: Any) -> None:
    """Warn of a licence that is not one of FREE: it also holds for what is made of the weights."""
    if source.license and source.license not in FREE:
        terms = f" ({source.origin_url})" if source.origin_url else ""
        _logger.warning(
            "%s: the weights%s are under the licence %s%s, and so is what you make of them",
            *(source.architecture, f" {source.hf_hub_id}" if source.hf_hub_id else "", source.license, terms),
        )


@contextlib.contextmanager
def refusing_unreadable(name: str, source: Any) -> Iterator[None]:
    """Turn what timm raises of weights that it cannot read into a ValueError of one line."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError, OSError, SafetensorError) as error:
        place = source.file or source.hf_hub_id or source.url or source.source
        cure = "name a file of weights" if source.file else "or name a file with pretrained_cfg_overlay"
        raise ValueError(
            f"{name}: pretrained weights {place!r} cannot be read: {one_line(error)[:300].rstrip('.')}; {cure}"
        ) from error


def _refuse_another_kernel(model: "SGConvNeXt", name: str) -> None:
    """Refuse options that the weights' own folder records otherwise: the shapes are the same, the kernels are not."""
    saved = getattr(model, "pretrained_model_args", {})
    if not saved:
        return
    given = {key: saved.get(key, default) for key, default in model.kernel_defaults.items()}
    here, then = next(layer for _, layer in _mixers(model)).options, kernel_options(**given)
    for key in ("decay", *DECAYS[here.decay]):
        if getattr(then, key) != getattr(here, key):
            told = f"{key}={given[key]}, not {getattr(here, key)}"
            raise ValueError(f"{name}: the pretrained file was trained with {told}; leave {key} out")


def _resized(state: dict[str, Any], model: "SGConvNeXt") -> dict[str, Any]:
    """The state with every kernel built for the size that the model's are built for."""
    layers = dict(_mixers(model))
    if not all(_resizable(state, name, layer) for name, layer in layers.items()):
        return state  # of another model: what differs is told later
    stages = [int(name.split(".")[1]) for name in layers]  # stages.0.blocks.0.sgconv
    weights = [state[f"{name}.weight"] for name in layers]
    scales = {stage: (weight.shape[1], weight.shape[3]) for stage, weight in zip(stages, weights, strict=True)}
    grids = _built_grids(scales, model)
    state = dict(state)
    for stage, (name, layer) in zip(stages, layers.items(), strict=True):
        if grids and grids[stage] != layer.input_size:
            state |= {f"{name}.{key}": value for key, value in _stretched(state, name, layer, grids[stage]).items()}
    return state


def _resizable(state: dict[str, Any], name: str, layer: SGConv2d) -> bool:
    """Whether a state has the layer's parameters, but for what follows from the input size."""
    for key, own in layer.state_dict().items():
        value: Any = state.get(f"{name}.{key}")
        if type(value) not in (Tensor, torch.nn.Parameter) or not value.is_floating_point() or value.is_meta:
            return False
        shape = own.shape
        if key == "weight" and value.ndim == 4:  # directions, N, C, d
            scales = shape[1] if layer.num_scales else value.shape[1]
            shape = torch.Size([shape[0], scales, shape[2], value.shape[3]])
        if value.shape != shape:
            return False
    return True


def _stretched(state: dict[str, Any], name: str, layer: SGConv2d, built: tuple[int, int]) -> dict[str, Tensor]:
    """The layer's own rule, applied to a layer that is built as the state's was."""
    source = SGConv2d(
        layer.channels,
        built,
        num_scales=layer.num_scales,
        bidirectional=layer.bidirectional,
        row_gap=layer.row_gap,
        bias=layer.bias is not None,
        device="meta",  # so that no random number is drawn
        **layer.options._asdict(),
    )
    own = {key: state[f"{name}.{key}"].to(layer.weight.dtype) for key in layer.state_dict()}
    source.load_state_dict(own, assign=True)
    source.set_input_size(layer.input_size)
    resized: dict[str, Tensor] = source.state_dict()
    return resized


def _built_grids(scales: Scales, model: "SGConvNeXt") -> Grids | None:
    """The sizes that kernels of so many scales and taps were built for; None for the model's own.

    Taps are rounded up from tokens, so they do not always tell. What is written beside the weights goes first (the
    arguments that they were made with, then pretrained_cfg), but only if it explains the taps of every stage.
    """
    layers, config = dict(_mixers(model)), model.pretrained_cfg  # type: dict[str, Any], Any
    layer = next(iter(layers.values()))
    written = getattr(model, "pretrained_model_args", {}).get("img_size"), config["input_size"][1:]
    for size in written:
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            grids = _grids(height // STEM_STRIDE, width // STEM_STRIDE)
            if _explains(grids, scales, layer):
                return grids
    if all(each.weight.shape[1::2] == scales[int(name.split(".")[1])] for name, each in layers.items()):
        return None
    # without a gap the rule knows tokens only: two sizes with as many in each stage are one
    found = {tuple(g if layer.row_gap else math.prod(g) for g in grids): grids for grids in _candidates(scales, layer)}
    if len(found) == 1:
        return next(iter(found.values()))
    square = [grids[0] for grids in _candidates(scales, layer) if grids[0][0] == grids[0][1]]
    example = ", ".join(str(STEM_STRIDE * side) for side in square[-1]) if square else "H, W"
    taps = "/".join(str(taps) for _, taps in scales.values())
    raise ValueError(
        f"{config['architecture']}: the pretrained file has kernels for another image size, and {len(found)} sizes go "
        f"with their {taps} taps per scale; add the one that they were built for to "
        f"pretrained_cfg_overlay, such as 'input_size': ({config['input_size'][0]}, {example})"
    )


def _mixers(model: "SGConvNeXt") -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SGConv2d))


def _grids(height: int, width: int) -> Grids:
    return [(height >> stage, width >> stage) for stage in range(4)]


def _explains(grids: Grids, scales: Scales, layer: SGConv2d) -> bool:
    return all(layer.scales_at(*grids[stage]) == each for stage, each in scales.items())


def _candidates(scales: Scales, layer: SGConv2d) -> Iterator[Grids]:
    """Every size, by the map of the first stage, whose tokens come to so many scales and taps."""
    num_scales, taps = scales.get(0, (1, 1))
    least, span = MIN_SIZE // STEM_STRIDE, 2 ** (num_scales - 1)
    fewest, most = 1 if layer.row_gap else span * (taps - 1) + 1, span * taps
    for height in range(least, most // least + 1):
        for width in range(max(least, -(-fewest // height)), most // height + 1):
            if _explains(grids := _grids(height, width), scales, layer):
                yield grids
