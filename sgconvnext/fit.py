"""Whether weights fit a model; if not, why, in one sentence with the cure.

Both halves of the package ask this: the trainer of a checkpoint, and timm's ``pretrained=True`` of a file.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import shortened

Shapes = dict[str, torch.Size]

# What reads the image, and what gives the classes, in a ConvNeXt of timm, of its authors, and within a CLIP model
_STEMS = ("stem.0.weight", "downsample_layers.0.0.weight", "visual.trunk.stem.0.weight")
_CLASSIFIERS = ("head.fc.weight", "head.weight", "visual.head.proj.weight", "visual.head.mlp.fc2.weight")


def refuse_misfit(model: nn.Module, found: Mapping[str, Any], place: str, skip: Collection[str] = ()) -> None:
    """Refuse weights of which not every key, shape and kind of number is the model's.

    Args:
        model: that they are for, on the CPU.
        found: tensors by key.
        place: what the message begins with, such as the name of a file.
        skip: keys, or modules, that need not match.

    Raises:
        ValueError: naming what differs and the cure.
    """

    def kept(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in tensors.items() if not any(within(key, name) for name in skip)}

    told = no_tensors(found)
    if not told:
        own, given = kept(model.state_dict()), kept(found)
        shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (own, given)]
        told = next((reason for check in _CHECKS if (reason := check(model, *shapes))), "") or _wrong_numbers(
            own, given
        )
    if told:
        raise ValueError(f"{place} {told}")


def is_convnext(found: Mapping[str, Any]) -> bool:
    """Whether weights are of a ConvNeXt: in timm's names, in those of its authors, or within a CLIP model."""
    return any(".conv_dw." in key or ".dwconv." in key for key in found if isinstance(key, str))


def convnext_ends(found: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of the images and classes of the head, of a ConvNeXt's weights; 3 without a stem, 0 without a head."""
    stem: Any = next((found[key].shape for key in _STEMS if key in found), ())
    head: Any = next((found[key].shape for key in _CLASSIFIERS if key in found), ())
    return stem[1] if len(stem) > 1 else 3, head[0] if head else 0


def classifiers(model: Any) -> tuple[str, ...]:
    """The names of the last layers, one for each set of logits, by timm's configuration of the model."""
    return _names(model, "classifier")


def first_convs(model: Any) -> tuple[str, ...]:
    """The names of the convolutions that read the image."""
    return _names(model, "first_conv")


def _names(model: Any, key: str) -> tuple[str, ...]:
    named = getattr(model, "pretrained_cfg", {}).get(key) or ()
    return (named,) if isinstance(named, str) else tuple(named)


def within(key: str, module: str) -> bool:
    """Whether a key of a state dict is of that module, or is it."""
    return key == module or key.startswith(module + ".")


def no_tensors(found: Mapping[str, Any]) -> str:
    """Why these are not weights by name; empty if they are."""
    if not found:
        return "has no weights for this model; name another file"
    for key, value in found.items():
        if not isinstance(key, str):
            return f"has {key!r} for the name of a weight; name another file"
        if type(value) not in (Tensor, nn.Parameter):  # a share of a tensor (DTensor) is none either
            return f"holds a {type(value).__name__} under {key!r}, where a tensor belongs; name another file"
        if value.is_meta:
            return f"holds a tensor without values under {key!r} (of the meta device); save it from a filled model"
        if value.layout != torch.strided:
            return f"holds a sparse tensor under {key!r}; save it as .to_dense()"
    return ""


def _reparameterized(_: Any, own: Shapes, found: Shapes) -> str:
    if any(key.endswith(".taps") and key not in own for key in found):
        return (
            "is of a reparameterized model, which has taps instead of parameters; take the weights from before "
            "timm.utils.reparameterize_model"
        )
    return ""


def _prefixed(_: Any, own: Shapes, found: Shapes) -> str:
    prefix = ""
    for part in next(iter(found)).split(".")[:-1]:
        if not all(key.startswith(f"{prefix}{part}.") for key in found):
            break
        prefix += f"{part}."
    if any(key in own for key in found) or not any(key.removeprefix(prefix) in own for key in found):
        return ""
    return (
        f"has {prefix!r} before each of its keys; write it without: "
        f"{{key.removeprefix({prefix!r}): value for key, value in weights.items()}}"
    )


def _other_mixer(_: Any, own: Shapes, found: Shapes) -> str:
    def mixed(keys: Shapes, names: str) -> bool:
        return any(re.search(rf"\.({names})\.", key) for key in keys)

    if mixed(own, "sgconv") and mixed(found, r"conv_dw\.gate"):
        return "is of a gated ConvNeXt, whose weights no SGConvNeXt takes; name convnext_NAME_gated"
    if mixed(own, "sgconv") and mixed(found, "conv_dw|dwconv"):
        return (
            "is of a ConvNeXt, whose 7x7 kernels this model does not hold; name sgconvnext_NAME_gap3, which does, or "
            "a checkpoint of an SGConvNeXt"
        )
    if mixed(own, "conv_dw") and mixed(found, "dwconv"):
        return (
            "has the names of ConvNeXt's own code; let timm convert them: model.pretrained=true "
            "model.kwargs={pretrained_cfg_overlay: {file: PATH}} in place of model.checkpoint"
        )
    if mixed(own, "conv_dw") and mixed(found, "sgconv"):
        return "is of an SGConvNeXt, the model is a ConvNeXt; name an sgconvnext model"
    return ""


def other_size(_: Any, own: Shapes, found: Shapes) -> str:
    """Why weights of other depths or widths do not fit; empty if they have the model's."""
    (depths, dims), (their_depths, their_dims) = stages(own), stages(found)
    if not their_depths or (depths, dims) == (their_depths, their_dims):
        return ""
    return (
        f"is of another size: it has depths {their_depths} and dims {their_dims}, the model depths {depths} and dims "
        f"{dims}; name the model that it was trained as, or give these depths and dims"
    )


def stages(shapes: Shapes) -> tuple[list[int], list[int]]:
    """Blocks, and width, of each stage of ConvNeXt's names."""
    depths: dict[int, int] = {}
    for key in shapes:
        if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key):
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
    norms = [shapes.get(f"stages.{stage}.blocks.0.norm.weight") for stage in sorted(depths)]
    return [depths[stage] for stage in sorted(depths)], [norm[0] for norm in norms if norm]


def _other_gate(_: Any, own: Shapes, found: Shapes) -> str:
    ours, theirs = (any(re.search(r"\.blocks\.\d+\.(conv_dw\.)?gate\.", key) for key in keys) for keys in (own, found))
    if ours == theirs:
        return ""
    kind, models = ("with", "_gated models") if theirs else ("without", "models without _gated")
    return (
        f"is of a model {kind} gates, such as the {models}; name that model, or build it with gate={theirs} and the "
        "mlp_ratio that it had"
    )


def _other_mlp(_: Any, own: Shapes, found: Shapes) -> str:
    key = "stages.0.blocks.0.mlp.fc1.weight"
    if key not in own or key not in found or own[key][:2] == found[key][:2]:
        return ""
    ours, theirs = (f"{shapes[key][0] / shapes[key][1]:g}" for shapes in (own, found))
    cure = f"build it with mlp_ratio={theirs}" if any(".sgconv." in each for each in own) else "keep the SGConvNeXt"
    return f"has MLPs whose hidden layer has {theirs} times the width, the model's has {ours} times; {cure}"


def _other_kernels(model: Any, own: Shapes, found: Shapes) -> str:
    ours, their = (any(key.endswith(".sgconv.bias") for key in keys) for keys in (own, found))
    if ours != their and any(key.endswith(".sgconv.weight") for key in found):
        return (
            f"is of a model {'with' if their else 'without'} a bias in its mixers, such as the "
            f"{'_gap3 models' if their else 'models without _gap3'}; name that model, or build it with bias={their} "
            "and the row_gap that it had"
        )
    for key, shape in own.items():
        theirs = found.get(key, shape)
        if not key.endswith("sgconv.weight") or theirs == shape or len(theirs) != 4:
            continue
        if theirs[0] != shape[0]:
            kinds = ("causal", "bidirectional") if theirs[0] < shape[0] else ("bidirectional", "causal")
            return "has {} kernels, the model's are {}; build it with bidirectional={}".format(*kinds, theirs[0] == 2)
        follows = model.get_submodule(key.removesuffix(".weight")).num_scales is None  # from the image size
        if theirs[1] != shape[1] and not follows:
            return f"has {theirs[1]} scales a kernel, the model {shape[1]}; build it with num_scales={theirs[1]}"
        if theirs[1] != shape[1] or theirs[3] != shape[3]:
            return (
                f"has kernels for another image size ({key} has {theirs[1]} scales of {theirs[3]} taps, the model "
                f"{shape[1]} of {shape[3]}), and does not say for which; build the model for that size (img_size, in "
                "train.py model.img_size); its set_input_size then changes it"
            )
    return ""


def _other_channels(model: Any, own: Shapes, found: Shapes) -> str:
    for key in [f"{name}.weight" for name in first_convs(model)]:
        shape, theirs = own.get(key, torch.Size()), found.get(key, torch.Size())
        if len(shape) == len(theirs) == 4 and (shape[0], *shape[2:]) == (theirs[0], *theirs[2:]) and shape != theirs:
            return (
                f"reads images of {theirs[1]} channels, the model of {shape[1]}; build it with in_chans={theirs[1]}, "
                f"or let timm convert it: timm.create_model(NAME, pretrained=True, in_chans={shape[1]}, "
                f"pretrained_cfg_overlay={{'file': PATH, 'input_size': ({theirs[1]}, H, W)}})"
            )
    return ""


def _other_classes(model: Any, own: Shapes, found: Shapes) -> str:
    differ = [key for key in {**own, **found} if own.get(key) != found.get(key)]
    names = classifiers(model)
    if not differ or not all(any(within(key, name) for name in names) for key in differ):
        return ""
    if not any(within(key, name) for key in found for name in names):
        return f"has no classifier ({', '.join(names)}); model.new_head=true starts from it with a new one"
    theirs, ours = (shapes[differ[0]][0] if differ[0] in shapes else 0 for shapes in (found, own))
    if theirs in (0, ours):  # a part of a classifier, or one of another kind
        return ""
    return (
        f"has a classifier ({differ[0]}) of {theirs} classes, the model of {ours}; model.new_head=true starts from it "
        "with a new classifier"
    )


def _other_keys(_: Any, own: Shapes, found: Shapes) -> str:
    problems = [
        ("missing", [key for key in own if key not in found]),
        ("unexpected", [key for key in found if key not in own]),
        ("shaped differently", [key for key in own if key in found and found[key] != own[key]]),
    ]
    told = [f"{len(keys)} {what} ({shortened(keys, 6)})" for what, keys in problems if keys]
    return f"is of another architecture; keys {'; '.join(told)}; name the model that it was trained as" if told else ""


def _wrong_numbers(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Copying would turn integers into floats, drop imaginary parts and keep NaN; masks may be infinite by design."""
    for key, tensor in own.items():
        theirs = found[key]
        if _kind(tensor) != _kind(theirs):
            return (
                f"holds {str(theirs.dtype).removeprefix('torch.')} under {key!r}, where the model has "
                f"{str(tensor.dtype).removeprefix('torch.')}; take the weights from before they were converted"
            )
        if tensor.is_floating_point() and tensor.isfinite().all() and not theirs.to(tensor.dtype).isfinite().all():
            return f"holds NaN or infinity under {key!r}; take an earlier checkpoint"
    return ""


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex() or tensor.dtype == torch.bool:
        return str(tensor.dtype)
    return "float" if tensor.is_floating_point() else "quantized" if tensor.is_quantized else "integer"


_CHECKS: tuple[Callable[[Any, Shapes, Shapes], str], ...] = (
    *(_prefixed, _reparameterized, _other_mixer, other_size, _other_gate, _other_mlp, _other_kernels),
    *(_other_channels, _other_classes, _other_keys),
)
