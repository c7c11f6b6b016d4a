"""Part 1 of the GPU plan, continued: the Triton operators around the block's MLP beside PyTorch's."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gpu_plan import Deadline, Plan, Stage
from .table import Table
from .timing import Step, interleave

EPS = 1e-6


def table(plan: Plan, deadline: Deadline) -> Table:
    """Both operators in every stage, forward or with all gradients; empty where Triton is not measured."""
    result = Table(
        "Norm and residual sum of a block in bf16, with the changes of layout",
        {"size": "", "stage": "d", "mode": ""}
        | {"norm ms": ".3g", "norm, triton ms": ".3g", "norm ratio": ".3f"}
        | {"sum ms": ".3g", "sum, triton ms": ".3g", "sum ratio": ".3f"},
        notes=[
            "norm: (B, C, L) in bf16 to tokens (B, L, C), in fp32 by PyTorch under autocast and in bf16 by triton; "
            "sum: of an fp32 shortcut (B, C, L) and the scaled branch (B, L, C) in bf16. ratio: triton's speed over "
            "PyTorch's."
        ],
    )
    if "triton" in plan.backends:
        for mode, stage in itertools.product(plan.modes, plan.stages()):
            measure = functools.partial(_measure, plan, stage, mode, result.rows)
            deadline.run(f"{mode} of norm and sum of {stage}", measure)
    return result


def _measure(plan: Plan, stage: Stage, mode: str, rows: list[dict[str, Any]]) -> None:
    norms, residuals = _steps(plan, stage, mode)
    row: dict[str, Any] = {"size": stage.size, "stage": stage.number, "mode": mode}
    for name, steps in (("norm", norms), ("sum", residuals)):
        timings = interleave(steps, torch.device(plan.device), plan.rounds, plan.seconds)
        row |= {f"{name} ms": 1e3 * timings[0].median, f"{name}, triton ms": 1e3 * timings[1].median}
        row[f"{name} ratio"] = timings[1].ratio
        row.setdefault("seconds", {})[name] = [timing.by_round for timing in timings]
    rows.append(row)


def _steps(plan: Plan, stage: Stage, mode: str) -> tuple[list[Step], list[Step]]:
    """Of the norm and of the sum: PyTorch's way, and Triton's."""
    from ..longconv.triton import block as triton_block

    batch, channels, length = plan.batch(mode), stage.channels, stage.side**2
    training = mode == "training"

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=plan.device).to(dtype).requires_grad_(training)

    x, y = tensor(batch, channels, length, dtype=torch.bfloat16), tensor(batch, length, channels, dtype=torch.bfloat16)
    shortcut, weight, bias, gamma = tensor(batch, channels, length), *(tensor(channels) for _ in range(3))

    def norm() -> Tensor:
        with torch.autocast(plan.device, torch.bfloat16):
            return F.layer_norm(x.transpose(1, 2), (channels,), weight, bias, EPS)

    def fused_norm() -> Tensor:
        return triton_block.layer_norm_channels_last(x, weight, bias, EPS)

    def residual() -> Tensor:
        return shortcut + (y * gamma).transpose(1, 2)

    def fused_residual() -> Tensor:
        return triton_block.scale_residual_channels_first(shortcut, y, gamma)

    norms = _in_mode(training, [norm, fused_norm], [x, weight, bias])
    return norms, _in_mode(training, [residual, fused_residual], [shortcut, y, gamma])


def _in_mode(training: bool, forwards: list[Callable[[], Tensor]], inputs: list[Tensor]) -> list[Step]:
    """Without gradients, or with those of the inputs for the same gradient of the output."""
    if not training:
        return [torch.no_grad()(forward) for forward in forwards]
    dy = torch.randn_like(forwards[0]())

    def step(forward: Callable[[], Tensor]) -> Step:
        own = dy.to(forward().dtype)
        return lambda: torch.autograd.grad(forward(), inputs, own)

    return [step(forward) for forward in forwards]
