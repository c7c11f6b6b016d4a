"""Part 3 of the GPU plan: SGConvNeXt against ConvNeXt, eager and compiled, and what the project wants of the ratio."""

import functools
import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from .gpu_plan import Deadline, Plan
from .table import Table
from .throughput import COMPILED, speed
from .timing import Step, Timing, interleave
from .workload import Workload, prepare

GOALS = {  # speed over ConvNeXt's: what it must be, and what we want
    ("tiny", "inference"): (0.95, 1.05),
    ("tiny", "training"): (1.00, 1.15),
    ("large", "inference"): (0.97, 1.05),
    ("large", "training"): (1.00, 1.15),
}
MEMORY_GOALS = (1.05, 1.00)  # peak of a training step over ConvNeXt's
PREPARING = 0.7  # of the time of a comparison: compiling takes as long as it takes, timing does not


@dataclass
class Variant:
    """A model that runs eagerly or compiled, the peak of its memory in bytes, and its time once it is known."""

    spec: str
    work: Workload
    peak: int
    timing: Timing | None = None

    @property
    def run(self) -> str:
        """How."""
        return "compiled" if self.work.compile else "eager"

    @property
    def ours(self) -> bool:
        """Whether it is SGConvNeXt."""
        return self.spec.startswith("sgconvnext")


def tables(plan: Plan, deadline: Deadline) -> list[Table]:
    """Every model in every mode, and the best of ours beside the best of theirs.

    Args:
        plan: sizes, modes, batches, backends.
        deadline: after which the rest is left out, and said so; every comparison gets an equal share of what is left.

    Raises:
        ValueError: more backends than torch.compile keeps versions of a network.
    """
    if len(plan.backends) > COMPILED:
        raise ValueError(
            f"--backends names {len(plan.backends)}; torch.compile keeps {COMPILED} versions of a network"
        )
    models, verdicts = _models_table(plan), _verdicts_table()
    comparisons = list(itertools.product(plan.sizes, plan.modes))
    for done, (size, mode) in enumerate(comparisons):
        variants = compare(plan, size, mode, deadline.share(1 / (len(comparisons) - done)))
        models.rows += [_row(variant) for variant in variants]
        if {variant.ours for variant in variants} == {True, False}:
            verdicts.rows += verdict(size, mode, variants)
    return [models, verdicts]


def compare(plan: Plan, size: str, mode: str, deadline: Deadline) -> list[Variant]:
    """ConvNeXt and SGConvNeXt with every backend, eager and compiled, timed in turns: those that ran in time."""
    specs = [f"convnext_{size}", *(f"sgconvnext_{size},backend={backend}" for backend in plan.backends)]
    _free()
    torch.compiler.reset()  # or the shapes of the last ones would make these ones dynamic
    ready: list[tuple[Variant, Step]] = []
    preparing = deadline.share(PREPARING)
    for compiled, spec in itertools.product((False, True), specs):
        work = Workload(
            mode=cast(Literal["inference", "training"], mode),
            batch=plan.batch(mode),
            img_size=(plan.img_size, plan.img_size),
            dtype="bf16",
            channels_last=True,
            compile=compiled,
            reparameterize=plan.reparameterize and mode == "inference",
            device=plan.device,
        )
        what = f"{mode} of {spec}{', compiled' if compiled else ''}"
        preparing.run(what, functools.partial(_prepare, spec, work, ready))
    deadline.run(f"timing {mode} of {size}", functools.partial(_time, plan, ready))
    return [variant for variant, _ in ready if variant.timing]


def _free() -> None:
    """Give back what earlier networks, and those that failed, left behind."""
    gc.collect()
    torch.cuda.empty_cache()


def _prepare(spec: str, work: Workload, ready: list[tuple[Variant, Step]]) -> None:
    """Build and warm up one more. Its peak is that of a step once algorithms are chosen, without what was there."""
    _free()
    before = torch.cuda.memory_allocated()
    step = prepare(spec, work)
    step()
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    ready.append((Variant(spec, work, torch.cuda.max_memory_allocated() - before), step))


def _time(plan: Plan, ready: Sequence[tuple[Variant, Step]]) -> None:
    steps = [step for _, step in ready]
    timings = interleave(steps, torch.device(plan.device), plan.model_rounds, plan.model_seconds) if steps else []
    for (variant, _), timing in zip(ready, timings, strict=True):
        variant.timing = timing


def _models_table(plan: Plan) -> Table:
    how = ", reparameterized for inference" if plan.reparameterize else ""
    return Table(
        f"Models in bf16 autocast, channels last{how}",
        {
            **{"model": "", "run": "", "mode": "", "batch": "d", "images/s": ".4g", "spread, %": ".1f"},
            **{"ratio": ".3f", "peak GiB": ".2f"},
        },
        notes=[
            f"{plan.img_size} px; training: forward, cross-entropy, backward, AdamW. images/s: median of "
            f"{plan.model_rounds} rounds; spread: (slowest - fastest round) / median; ratio: speed over that of the "
            "first of the same mode and size, as the median over pairs of turns.",
            "peak GiB: the allocator's during a step after the second, with weights, images and optimiser.",
        ],
    )


def _row(variant: Variant) -> dict[str, Any]:
    assert variant.timing is not None
    work = variant.work
    row = {"model": variant.spec, "run": variant.run, "mode": work.mode, "batch": work.batch}
    return row | speed(work.batch, variant.timing) | {"peak GiB": variant.peak / 2**30}


def _verdicts_table() -> Table:
    return Table(
        "The best of ours over the best of theirs",
        {
            **{"size": "", "mode": "", "measure": "", "theirs": "", "ours": ""},
            **{"ratio": ".3f", "must": ".2f", "target": ".2f", "reached": ""},
        },
        notes=[
            "speed: of the fastest variants, as the median over pairs of turns, above 1 is faster; peak memory: of "
            "the same variants, below 1 is less."
        ],
    )


def verdict(size: str, mode: str, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Speed, and for training memory, of the fastest of ours over the fastest of theirs."""
    theirs, ours = (
        min((variant for variant in variants if variant.ours == own), key=lambda variant: _timing(variant).median)
        for own in (False, True)
    )
    names = {"size": size, "mode": mode, "theirs": f"{theirs.spec}, {theirs.run}", "ours": f"{ours.spec}, {ours.run}"}
    ratio = Timing(_timing(ours).rounds, _timing(theirs).rounds).ratio
    rows = [names | {"measure": "speed", "ratio": ratio} | _judged(ratio, GOALS.get((size, mode)))]
    if mode == "training" and theirs.peak:
        ratio = ours.peak / theirs.peak
        judged = _judged(1 / ratio, (1 / MEMORY_GOALS[0], 1 / MEMORY_GOALS[1]))
        judged |= dict(zip(("must", "target"), MEMORY_GOALS, strict=True))
        rows.append(names | {"measure": "peak memory", "ratio": ratio} | judged)
    return rows


def _timing(variant: Variant) -> Timing:
    assert variant.timing is not None
    return variant.timing


def _judged(value: float, goals: tuple[float, float] | None) -> dict[str, Any]:
    """The goals, and which of them a value reaches from above; nothing for a size without goals."""
    if goals is None:
        return {}
    must, target = goals
    reached = "target" if value >= target else "must" if value >= must else "neither"
    return {"must": must, "target": target, "reached": reached}
