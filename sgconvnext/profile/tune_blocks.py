"""Measure which form of a block's forward is the fastest on this machine: `sgconvnext.tune` does so for all blocks."""

import copy
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..longconv import check
from ..models import ways
from ..models.block import SGConvNeXtBlock
from ..models.fused import fused_forward, is_hooked, packed_form, triton_form
from ..models.packed_mlp import sizes_of_their_own
from ..models.ways import Way, tokens_of
from ..tuning import BlockChoice
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
    """The different blocks of a forward pass, by what they do and the tokens; nothing changes in the model.

    Where somebody's hooks watch what is inside, a block runs by its modules, and is left alone here.
    """
    found: dict[tuple[ways.Block, int], Seen] = {}
    trains = model.training

    def see(block: SGConvNeXtBlock, inputs: tuple[Tensor]) -> None:
        [x] = inputs
        with torch.set_grad_enabled(trains):
            key = ways.block_of(block, x), tokens_of(x)
        found.setdefault(key, Seen(block, torch.empty_like(x, device="meta"), x.device))

    blocks = [own for own in model.modules() if type(own) is SGConvNeXtBlock and not is_hooked(own)]
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
    shipped = _shipped(own, x)
    candidates = _candidates(which, tokens, shipped)
    if len(candidates) < 2:
        return None
    truth = functools.cache(lambda: _results(copy.deepcopy(own).double(), x.double(), dy.double(), Way("modules")))

    def errors(way: Way) -> dict[str, float]:
        with torch.autocast(x.device.type, enabled=False):
            want = truth()
        got = _results(own, x, dy, way)
        return {part: check.relative_error(got[part], want[part]) for part in got}

    with sizes_of_their_own():
        measured = race.run(
            {
                str(way): race.Candidate(functools.partial(errors, way), functools.partial(_step, seen, x, dy, way))
                for way in candidates
            },
            _tolerance(which),
            str(shipped),
            x.device,
            f"no form of a block of {which.channels} channels is right",
        )
    plain = which._asdict() | {"dtype": str(which.dtype).partition(".")[2]}
    return BlockChoice(tokens=tokens, **plain, **measured)


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


def _shipped(block: SGConvNeXtBlock, x: Tensor) -> Way:
    """The way without a measurement."""
    with torch.set_grad_enabled(x.requires_grad), ways.only(None):
        form: Any = fused_forward(block, x)
    if form is triton_form:
        return Way("triton")
    arguments = getattr(form, "keywords", {})
    kind = "packed" if getattr(form, "func", None) is packed_form else "modules"
    return Way(kind, arguments["most"] if "most" in arguments and arguments["most"] < tokens_of(x) else 0)


def _tolerance(which: ways.Block) -> float:
    rounded = torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32
    return TOLERANCE[torch.bfloat16 if rounded and which.dtype == torch.float32 else which.dtype]


def _candidates(which: ways.Block, tokens: int, shipped: Way) -> list[Way]:
    if which.device != "cpu":
        return [shipped, Way("modules")] if shipped.kind == "triton" else [shipped]
    kinds = ("modules", "packed") if shipped.kind == "packed" else ("modules",)
    found = [Way(kind, most) for kind in kinds for most in CHUNKS if most < tokens]
    return found if shipped in found else [shipped, *found]


def _results(block: SGConvNeXtBlock, x: Tensor, dy: Tensor, way: Way) -> dict[str, Tensor]:
    """The branch; where x needs a gradient also dx, and the gradients of all weights in one."""
    if not x.requires_grad:
        with torch.no_grad(), ways.only(way):
            return {"y error": block(x) - x}
    x, weights = x.detach().requires_grad_(), _trained(block)
    with torch.enable_grad(), ways.only(way):
        y = block(x)
        dx, *dweights = torch.autograd.grad(y, [x, *weights], dy.to(y.dtype))
    found = {"y error": (y - x).detach(), "dx error": dx}
    if dweights:
        found["weights error"] = torch.cat([each.double().flatten() for each in dweights])
    return found


def _step(seen: Seen, x: Tensor, dy: Tensor, way: Way) -> Step:
    """Forward, or forward and all gradients, of the block as it is: drop path takes time too."""
    own = copy.deepcopy(seen.block)  # of each way: what one keeps, another one would free

    def forward() -> Tensor:
        with ways.only(way):
            result: Tensor = own(x)
        return result

    return race.step(forward, [x, *_trained(own)] if x.requires_grad else [], dy)


def _trained(block: SGConvNeXtBlock) -> list[nn.Parameter]:
    return [weight for weight in block.parameters() if weight.requires_grad]
