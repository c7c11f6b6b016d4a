"""Parameters, MACs and activations per stage and part, counted by fvcore with our own formulas for our operators.

Units and conventions are fvcore's and timm's, so that numbers compare with theirs: a MAC is one multiply-add, or two
FLOPs; norms and softmax cost 5 MACs per element (a norm without parameters 4) and pooling 1; elementwise arithmetic
(GELU, residual sums, layer scale, the product of a gate) is free; activations are the outputs of convolutions and
matrix products. Transforms and complex products cost half their FLOPs.
"""

import functools
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import one_line
from ..longconv.cost import image_interpolation, linear_interpolation
from ..models.gated_convnext import GatedConvolution
from ..models.layer import SGConv2d
from ..sequences.layer import SGConv
from ..training import build
from .layer_cost import LayerCost, layer_cost
from .table import Table
from .workload import random_images, spoken_size

with warnings.catch_warnings():  # to be imported, fvcore scripts a loss, and torch deprecates scripting
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
    from fvcore.nn.jit_handles import elementwise_flop_counter, generic_activation_jit, get_shape

Handler = Callable[[list[Any], list[Any]], Any]

# Operations that cost nothing by the convention above, beside those that fvcore itself leaves out
ELEMENTWISE = frozenset(
    f"aten::{name}{ending}"
    for names in (
        "add addcmul sub rsub mul div neg abs ceil pow sqrt rsqrt exp log sin cos",
        "where lt le ne logical_and logical_or",
        "gelu silu sigmoid tanh elu leaky_relu prelu relu6 hardtanh hardswish hardsigmoid softplus",
        "clamp_min clamp_max channel_shuffle pixel_shuffle pixel_unshuffle feature_dropout",
        "linspace ones_like flip unflatten alias repeat clone movedim expand_as pad meshgrid index_select",
    )
    for name in names.split()
    for ending in ("", "_")
) | {"sgconvnext::scale_residual_channels_first"}

STEM, KERNEL, CONVOLUTION, GATE, MLP, NORM, HEAD, OTHER = PARTS = (
    "stem and downsampling",
    "kernel generation",
    "convolution",
    "gate",
    "MLP",
    "norm and layer scale",
    "head",
    "other",
)
EXECUTED = f"{CONVOLUTION}, executed"
COLUMNS = (STEM, KERNEL, CONVOLUTION, EXECUTED, GATE, MLP, NORM, HEAD, OTHER)

# the outermost modules and parameters of ConvNeXt and SGConvNeXt, in timm's names, that a part consists of
_MODULES = {
    r"stem()": STEM,
    r"stages\.(\d+)\.downsample": STEM,
    r"stages\.(\d+)\.blocks\.\d+\.(?:sgconv|conv_dw|conv_dw\.conv)": CONVOLUTION,
    r"stages\.(\d+)\.blocks\.\d+\.(?:conv_dw\.)?gate": GATE,
    r"stages\.(\d+)\.blocks\.\d+\.mlp": MLP,
    r"stages\.(\d+)\.blocks\.\d+\.(?:norm|gamma)": NORM,
    r"head()": HEAD,
}


class UncountedError(ValueError):
    """A model whose cost cannot be counted."""


@dataclass
class Cost:
    """Parameters; MACs of the algorithm, MACs of what runs, and activations of a whole batch."""

    parameters: int = 0
    macs: float = 0
    executed: float = 0
    activations: float = 0

    def __iadd__(self, other: "Cost") -> "Cost":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def __neg__(self) -> "Cost":
        return Cost(**{name: -value for name, value in vars(self).items()})


@dataclass(frozen=True)
class Count:
    """Cost by (stage, part); a stage is "stem", "1" .. "4", "head", or "rest" for what is in none of them."""

    costs: dict[tuple[str, str], Cost]

    def total(self, stage: str | None = None, part: str | None = None) -> Cost:
        """The sum over all stages and parts, or over one of them."""
        total = Cost()
        for (of_stage, of_part), cost in self.costs.items():
            if stage in (None, of_stage) and part in (None, of_part):
                total += cost
        return total


def count(model: nn.Module, images: Tensor) -> Count:
    """Count a forward pass in evaluation mode, in which the model is left.

    "macs" is the algorithm's: a long convolution of L tokens is three FFT steps of 2L points, whatever runs it.
    "executed" is what the layer's backend runs at that length: FFTs of a padded length, products of matrices, or
    products of whole tiles.

    Args:
        model: timm's; parts are told apart by the names that they have in ConvNeXt and SGConvNeXt.
        images: (B, C, H, W); the model runs on them, twice.

    Raises:
        UncountedError: the model cannot run on them, or runs an operation that nobody wrote a formula for.
    """
    model = model.eval()
    with torch.no_grad():
        flops = _quiet(FlopCountAnalysis(model, images)).set_op_handle(**HANDLERS)
        activations = _quiet(ActivationCountAnalysis(model, images)).set_op_handle(**_ACTIVATIONS)
        try:
            with _watched(model) as calls:
                flops.total()  # runs the model; before it no operation is known
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise UncountedError(f"{type(model).__name__} on {tuple(images.shape)}: {one_line(error)}") from error
        _refuse_unknown(model, flops, calls)
        costs: defaultdict[tuple[str, str], Cost] = defaultdict(Cost)
        for name, module in model.named_modules():
            if (place := _place(name)) and not isinstance(module, GatedConvolution):  # its parts have places
                stage, part = place
                for found, cost in _costs(name, part, flops, activations, calls).items():
                    costs[stage, found] += cost
                own = num_parameters(module)
                if isinstance(module, SGConv2d):  # all parameters of the layer but the bias make its taps
                    bias = 0 if module.bias is None else module.channels
                    costs[stage, KERNEL].parameters += own - bias
                    own = bias
                costs[stage, part].parameters += own
        for name, parameter in model.named_parameters():
            if place := _place(name):
                costs[place].parameters += parameter.numel()
        rest = Cost(num_parameters(model))
        for cost in _costs("", OTHER, flops, activations, calls).values():
            rest += cost
    for cost in costs.values():
        rest += -cost
    if rest != Cost():
        costs["rest", OTHER] = rest
    return Count(dict(costs))


def num_parameters(model: nn.Module) -> int:
    """Trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def _quiet(analysis: Any) -> Any:
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


def _place(name: str) -> tuple[str, str] | None:
    """Stage and part of a module that is a whole part."""
    for pattern, part in _MODULES.items():
        if match := re.fullmatch(pattern, name):
            return (str(int(match[1]) + 1) if match[1] else name), part
    return None


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, list[LayerCost]]]:
    """What every call of an SGConv or SGConv2d cost, by the layer's name, while the model ran within the context.

    A tracer cannot count it: while a model is traced, plain operators run in place of the backend.
    """
    calls: dict[str, list[LayerCost]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, SGConv | SGConv2d):
            calls[name] = []
            handles.append(module.register_forward_hook(functools.partial(_note, calls[name])))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _note(calls: list[LayerCost], layer: Any, _: Any, output: Any) -> None:
    calls.append(layer_cost(layer, output))


def _costs(name: str, part: str, flops: Any, activations: Any, calls: dict[str, list[LayerCost]]) -> dict[str, Cost]:
    """Costs of a module by part: KERNEL for making the kernels of its SGConv layers, and ``part`` for all else."""
    layers = [layer for layer in calls if not name or f"{layer}.".startswith(f"{name}.")]
    plain = flops.total(name) - sum(map(flops.total, layers))
    costs = {part: Cost(0, plain, plain, activations.total(name) - sum(map(activations.total, layers)))}
    for call in (call for layer in layers for call in calls[layer]):
        costs[part] += Cost(0, call.algorithm, call.executed, call.activations)
        costs[KERNEL] = costs.get(KERNEL, Cost())
        costs[KERNEL] += Cost(0, call.kernel, call.kernel)
    return costs


def _refuse_unknown(model: nn.Module, flops: Any, layers: Iterable[str]) -> None:
    """Refuse operations without a formula, but for those in SGConv layers, which `layer_cost` counts."""
    unknown = Counter(flops.unsupported_ops())
    for layer in layers:
        unknown -= flops.unsupported_ops(layer)
    names = sorted(set(unknown) - ELEMENTWISE)
    if names:
        raise UncountedError(
            f"{type(model).__name__} runs {', '.join(names)}, which no formula counts; add one to HANDLERS in "
            "sgconvnext/profile/flops.py, or the name to ELEMENTWISE if it is free"
        )


def _einsum(inputs: list[Any], outputs: list[Any]) -> Any:
    """One MAC for every combination of the indices."""
    equation = inputs[0].toIValue().replace(" ", "")
    operands = equation.split("->")[0].split(",")
    if len(operands) != 2 or "." in equation:
        raise UncountedError(f"einsum {equation!r} has no formula; write it as products of two operands")
    sizes: dict[str, int] = {}
    for letters, value in zip(operands, inputs[1].node().inputs(), strict=True):
        sizes |= dict(zip(letters, get_shape(value), strict=True))
    return math.prod(sizes.values())


def _interpolation(inputs: list[Any], outputs: list[Any]) -> float:
    return linear_interpolation(math.prod(get_shape(outputs[0]))) / 2


def _image_interpolation(inputs: list[Any], outputs: list[Any]) -> float:
    return image_interpolation(get_shape(inputs[0])[2], get_shape(outputs[0])) / 2


def _attention(inputs: list[Any], outputs: list[Any]) -> float:
    """Queries times keys, and weights times values."""
    queries, keys, values = (get_shape(value) for value in inputs[:3])
    return float(math.prod(queries[:-1])) * keys[-2] * (queries[-1] + values[-1])


HANDLERS: dict[str, Handler] = {
    "aten::einsum": _einsum,
    "aten::upsample_linear1d": _interpolation,
    "aten::upsample_bilinear2d": _image_interpolation,
    "aten::scaled_dot_product_attention": _attention,
    **dict.fromkeys(
        [f"aten::{name}" for name in ("mean", "sum", "norm", "linalg_vector_norm", "avg_pool2d", "max_pool2d")],
        elementwise_flop_counter(1, 0),
    ),
    **dict.fromkeys(["aten::softmax", "sgconvnext::layer_norm_channels_last"], elementwise_flop_counter(5, 0)),
}
_ACTIVATIONS: dict[str, Handler] = {"aten::scaled_dot_product_attention": generic_activation_jit()}


def tables(models: Sequence[str], img_size: tuple[int, int], batch: int, stages: bool) -> list[Table]:
    """Totals of every model, and its MACs by part.

    Args:
        models: timm's names, with arguments after commas.
        img_size: height and width that the models are built for and run at.
        batch: images; every count is divided by it, so that what a batch shares (the kernels) weighs less.
        stages: a third table of every part of every stage.

    Raises:
        ValueError: a model that cannot be built, or counted.
    """
    what = f"per image of {spoken_size(img_size)} px in a batch of {batch}"
    numbers = {"parameters": ",d", "GMACs": ".2f", "executed": ".2f", "GFLOPs": ".2f", "activations": ",.0f"}
    totals = Table(
        f"Cost of a forward pass, {what}",
        {"model": ""} | numbers,
        notes=[
            "1 MAC = 2 FLOPs. GMACs and GFLOPs are the algorithm's, with FFTs of 2L points; executed: GMACs of the "
            "backends that are chosen. As in timm, norms cost 5 MACs per element, and elementwise arithmetic nothing.",
        ],
    )
    parts = Table(f"MMACs by part, {what}", {"model": ""})
    details = Table(
        f"Parts of the stages, {what}",
        {
            **{"model": "", "stage": "", "part": "", "parameters": ",d"},
            **{"MMACs": ",.3f", "executed": ",.3f", "MFLOPs": ",.3f", "activations": ",.0f"},
        },
    )
    for spec in models:
        model = build.from_spec(spec, img_size)
        counted = count(model, random_images(model, batch, img_size))
        totals.rows.append({"model": spec} | _per_image(counted.total(), batch, "G", 1e9))
        by_part = {part: _per_image(counted.total(part=part), batch, "M", 1e6) for part in PARTS}
        row = {part: found["MMACs"] for part, found in by_part.items()} | {EXECUTED: by_part[CONVOLUTION]["executed"]}
        parts.rows.append({"model": spec} | {part: macs for part, macs in row.items() if macs})
        for (stage, part), cost in counted.costs.items():
            details.rows.append({"model": spec, "stage": stage, "part": part} | _per_image(cost, batch, "M", 1e6))
    parts.columns |= {part: ",.1f" for part in COLUMNS if any(part in row for row in parts.rows)}
    return [totals, parts, details] if stages else [totals, parts]


def _per_image(cost: Cost, batch: int, prefix: str, unit: float) -> dict[str, Any]:
    return {
        "parameters": cost.parameters,
        f"{prefix}MACs": cost.macs / batch / unit,
        "executed": cost.executed / batch / unit,
        f"{prefix}FLOPs": 2 * cost.macs / batch / unit,
        "activations": cost.activations / batch,
    }
