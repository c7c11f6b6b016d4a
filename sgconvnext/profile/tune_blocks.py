"""Measure which form of a block's forward is the fastest on this machine: `sgconvnext.tune` does so for all blocks."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import is_out_of_memory, one_line
from ..longconv import check
from ..models import ways
from ..models.block import SGConvNeXtBlock
from ..models.fused import fused_forward, packed_form, triton_form
from ..models.ways import Way
from ..tuning import BLOCK_ERRORS, BlockChoice
from . import race
from .timing import Step

CHUNKS = (512, 1024, 2048, 4096, 0)  # tokens at a time; 0 for all
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative


class Seen(NamedTuple):
    """A block of a network, and the map that it had: its shape, dtype and layout, without memory."""

    block: SGConvNeXtBlock
    x: Tensor
    device: torch.device


def choices(model: nn.Module, batch: Tensor) -> list[BlockChoice]:
    """The fastest way of each different block, of those whose output, and in training gradients, are right."""
    measured = [_measure(which, tokens, seen) for (which, tokens), seen in _seen(model, batch).items()]
    return [choice for choice in measured if choice is not None]


def _seen(model: nn.Module, batch: Tensor) -> dict[tuple[ways.Block, int], Seen]:
    """The different blocks of a forward pass, by what they do and the tokens; nothing changes in the model."""
    found: dict[tuple[ways.Block, int], Seen] = {}
    trains = model.training

    def see(block: SGConvNeXtBlock, inputs: tuple[Tensor]) -> None:
        [x] = inputs
        with torch.set_grad_enabled(trains):
            key = ways.block_of(block, x), _tokens(x)
        found.setdefault(key, Seen(block, torch.empty_like(x, device="meta"), x.device))

    blocks = [module for module in model.modules() if type(module) is SGConvNeXtBlock]
    handles = [block.register_forward_pre_hook(see) for block in blocks]
    try:
        with race.evaluated(model), torch.no_grad():
            getattr(model, "_orig_mod", model).forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _measure(which: ways.Block, tokens: int, seen: Seen) -> BlockChoice | None:
    """Check the ways, time those that are right, and choose; None if there is but one."""
    own = _copy(seen)
    x = torch.empty_like(seen.x, device=seen.device).normal_().requires_grad_(which.work == "training")
    dy = torch.randn_like(x)
    # its gradient hides that of the branch; but in half precision nothing but rounding would be left without it
    shortcut = dy if dy.itemsize >= 4 else torch.zeros_like(dy)
    shipped = _shipped(own, x, which)
    candidates = _candidates(own, x, which, tokens, shipped)
    if len(candidates) < 2:
        return None
    want = _results(copy.deepcopy(own).double(), x.double(), dy.double(), shortcut.double(), Way("modules"), False)
    errors: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    steps: dict[str, Step] = {}
    for way in candidates:
        name = str(way)
        try:
            got = _results(own, x, dy, shortcut, way, True)
            errors[name] = {
                part: check.relative_error(a, b) for part, a, b in zip(BLOCK_ERRORS, got, want, strict=False)
            }
            if all(error <= _tolerance(which) for error in errors[name].values()):
                steps[name] = _step(copy.deepcopy(own), x, dy, way)  # what one keeps, another one would free
            else:
                left_out[name] = "wrong, " + ", ".join(f"{part} {error:.1e}" for part, error in errors[name].items())
        except Exception as error:  # of a compiler, a driver, the memory: the others may work
            left_out[name] = "out of memory" if is_out_of_memory(error) else f"fails: {one_line(error)[:200]}"
    if not steps:
        told = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ValueError(f"no form of a block of {which.channels} channels is right: {told}")
    seconds, slow = race.times(steps, str(shipped), x.device)
    return BlockChoice(
        device=which.device,
        dtype=str(which.dtype).partition(".")[2],
        channels=which.channels,
        work=which.work,
        tokens=tokens,
        backend=race.fastest(seconds, str(shipped)),
        shipped=str(shipped),
        seconds=seconds,
        errors=errors,
        left_out=left_out | slow,
    )


def _copy(seen: Seen) -> SGConvNeXtBlock:
    """A block that drops nothing, and whose branch is as large as its shortcut, or rounding would hide it."""
    own = copy.deepcopy(seen.block)
    own.drop_path = nn.Identity()
    if own.gamma is not None:
        nn.init.ones_(own.gamma)
    exact = copy.deepcopy(own).double()
    x = torch.randn(1, *seen.x.shape[1:], dtype=torch.float64, device=seen.device)
    with torch.no_grad(), ways.only(Way("modules")), torch.autocast(seen.device.type, enabled=False):
        size = (exact(x) - x).std().clamp(min=1e-6)  # 0 where the last weights are
        for parameter in own.mlp.fc2.parameters():
            parameter.div_(size.to(parameter.dtype))
    return own


def _shipped(block: SGConvNeXtBlock, x: Tensor, which: ways.Block) -> Way:
    """The way without a measurement."""
    with torch.set_grad_enabled(which.work == "training"), ways.only(None):
        form: Any = fused_forward(block, x)
    if form is triton_form:
        return Way("triton")
    arguments = getattr(form, "keywords", {})
    kind = "packed" if getattr(form, "func", None) is packed_form else "modules"
    return Way(kind, arguments["most"] if "most" in arguments and arguments["most"] < _tokens(x) else 0)


def _tolerance(which: ways.Block) -> float:
    rounded = torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32
    return TOLERANCE[torch.bfloat16 if rounded and which.dtype == torch.float32 else which.dtype]


def _tokens(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _candidates(block: SGConvNeXtBlock, x: Tensor, which: ways.Block, tokens: int, shipped: Way) -> list[Way]:
    if which.device != "cpu":
        return [shipped, Way("modules")] if shipped.kind == "triton" else [shipped]
    kinds = ("modules", "packed") if shipped.kind == "packed" else ("modules",)
    found = [Way(kind, most) for kind in kinds for most in CHUNKS if most < tokens]
    return found if shipped in found else [shipped, *found]


def _results(
    block: SGConvNeXtBlock, x: Tensor, dy: Tensor, shortcut: Tensor, way: Way, autocast: bool
) -> list[Tensor]:
    """The branch; in training also dx less a part, and all gradients of the weights in one."""
    context = torch.autocast(x.device.type, enabled=autocast and torch.is_autocast_enabled(x.device.type))
    if not x.requires_grad and not block.training:
        with torch.no_grad(), ways.only(way), context:
            return [block(x) - x]
    x, weights = x.detach().requires_grad_(), [weight for weight in block.parameters() if weight.requires_grad]
    with torch.enable_grad(), ways.only(way), context:
        y = block(x)
        dx, *dweights = torch.autograd.grad(y, [x, *weights], dy.to(y.dtype))
    whole = [torch.cat([each.double().flatten() for each in dweights])] if dweights else []  # all may be frozen
    return [(y - x).detach(), dx - shortcut, *whole]


def _step(block: SGConvNeXtBlock, x: Tensor, dy: Tensor, way: Way) -> Step:
    """Forward, or forward and all gradients."""
    weights = [weight for weight in block.parameters() if weight.requires_grad]

    def infer() -> None:
        with torch.no_grad(), ways.only(way):
            block(x)

    def train() -> None:
        with torch.enable_grad(), ways.only(way):
            y = block(x)
            torch.autograd.grad(y, [x, *weights], dy.to(y.dtype))

    return train if x.requires_grad else infer
