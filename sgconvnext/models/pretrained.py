"""Weights on their way into a model that timm builds: checked key by key, resized where its img_size is another."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..fit import refuse_misfit
from .input_size import MIN_SIZE, STEM_STRIDE
from .kernel import DECAYS, kernel_options, scale_dim_for
from .layer import SGConv2d

if TYPE_CHECKING:
    from .sgconvnext import SGConvNeXt

_logger = logging.getLogger(__name__)

Grids = list[tuple[int, int]]  # H, W of the stages' maps, for which the kernels are built


def checkpoint_filter_fn(state_dict: dict[str, Any], model: "SGConvNeXt", strict: bool = True) -> dict[str, Any]:
    """timm's hook between a file and the model: weights trained for another ``img_size`` are resized.

    Gives what loading into a model of the built size and then `SGConvNeXt.set_input_size` would. Unless ``strict``,
    keys may be missing, or too many.

    Raises:
        ValueError: the weights are of another model, or it cannot be known for which size they were built.
    """
    config: Any = model.pretrained_cfg
    name, classes = config["architecture"], config["num_classes"]
    theirs = getattr(state_dict.get("head.fc.weight"), "shape", [classes])[0]
    if model.num_classes and theirs != classes:  # else timm drops the trained classifier, and tells nobody
        raise ValueError(
            f"{name}: the weights have a classifier of {theirs} classes, their pretrained_cfg says {classes}; add "
            f"'num_classes': {theirs} to pretrained_cfg_overlay"
        )
    _refuse_another_kernel(model, name)
    resized = _resized(state_dict, model)
    changing = ["head.fc"] if model.num_classes != classes else []  # timm leaves it out, and converts the stem
    if model.in_chans != config["input_size"][0]:
        changing.append("stem.0.weight")
    if strict:
        refuse_misfit(model, resized, f"{name}: the pretrained file", changing)
    return resized


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
    taps = {stage: state[f"{name}.weight"].shape[3] for stage, name in zip(stages, layers, strict=True)}
    grids = _built_grids(taps, model)
    state = dict(state)
    for stage, (name, layer) in zip(stages, layers.items(), strict=True):
        if grids and grids[stage] != layer.input_size:
            state |= {f"{name}.{key}": value for key, value in _stretched(state, name, layer, grids[stage]).items()}
    return state


def _resizable(state: dict[str, Any], name: str, layer: SGConv2d) -> bool:
    """Whether a state has the layer's parameters, but for the number of taps."""
    for key, own in layer.state_dict().items():
        value: Any = state.get(f"{name}.{key}")
        if type(value) not in (Tensor, torch.nn.Parameter) or not value.is_floating_point() or value.is_meta:
            return False
        shape, free = own.shape, 1 if key == "weight" else 0
        if value.ndim != len(shape) or value.shape[: len(shape) - free] != shape[: len(shape) - free]:
            return False
    return True


def _stretched(state: dict[str, Any], name: str, layer: SGConv2d, built: tuple[int, int]) -> dict[str, Tensor]:
    """The layer's own rule, applied to a layer that is built as the state's was."""
    source = SGConv2d(
        layer.channels,
        built,
        num_scales=layer.weight.shape[1],
        bidirectional=layer.bidirectional,
        device="meta",  # so that no random number is drawn
        **layer.options._asdict(),
    )
    own = {key: state[f"{name}.{key}"].to(layer.weight.dtype) for key in layer.state_dict()}
    source.load_state_dict(own, assign=True)
    source.set_input_size(layer.input_size)
    resized: dict[str, Tensor] = source.state_dict()
    return resized


def _built_grids(taps: dict[int, int], model: "SGConvNeXt") -> Grids | None:
    """The sizes that kernels with so many taps per scale and stage were built for; None for the model's own.

    Taps are rounded up from tokens, so they do not always tell. What is written beside the weights goes first (the
    arguments that they were made with, then pretrained_cfg), but only if it explains the taps of every stage.
    """
    layers, config = dict(_mixers(model)), model.pretrained_cfg  # type: dict[str, Any], Any
    scales = next(iter(layers.values())).weight.shape[1]
    written = getattr(model, "pretrained_model_args", {}).get("img_size"), config["input_size"][1:]
    for size in written:
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            grids = _grids(height // STEM_STRIDE, width // STEM_STRIDE)
            if _explains(grids, taps, scales):
                return grids
    if all(layer.weight.shape[3] == taps[int(name.split(".")[1])] for name, layer in layers.items()):
        return None
    found = {tuple(h * w for h, w in grids): grids for grids in _candidates(taps, scales)}
    if len(found) == 1:
        return next(iter(found.values()))  # the rule knows tokens only: two sizes with as many in each stage are one
    square = [grids[0] for grids in _candidates(taps, scales) if grids[0][0] == grids[0][1]]
    example = ", ".join(str(STEM_STRIDE * side) for side in square[-1]) if square else "H, W"
    raise ValueError(
        f"{config['architecture']}: the pretrained file has kernels for another image size, and {len(found)} sizes go "
        f"with their {'/'.join(map(str, taps.values()))} taps per scale; add the one that they were built for to "
        f"pretrained_cfg_overlay, such as 'input_size': ({config['input_size'][0]}, {example})"
    )


def _mixers(model: "SGConvNeXt") -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SGConv2d))


def _grids(height: int, width: int) -> Grids:
    return [(height >> stage, width >> stage) for stage in range(4)]


def _explains(grids: Grids, taps: dict[int, int], scales: int) -> bool:
    return all(scale_dim_for(grids[stage][0] * grids[stage][1], scales) == each for stage, each in taps.items())


def _candidates(taps: dict[int, int], scales: int) -> Iterator[Grids]:
    """Every size, by the map of the first stage, whose tokens come to so many taps."""
    least, span = MIN_SIZE // STEM_STRIDE, 2 ** (scales - 1)
    fewest, most = span * (taps.get(0, 1) - 1) + 1, span * taps.get(0, 1)
    for height in range(least, most // least + 1):
        for width in range(max(least, -(-fewest // height)), most // height + 1):
            if _explains(grids := _grids(height, width), taps, scales):
                yield grids
