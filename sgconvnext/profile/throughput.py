"""Models side by side: speed in interleaved rounds, and peak memory."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..training import build
from . import flops
from .table import Table, interruptible
from .timing import Timing, interleave
from .workload import DoesNotFitError, Workload, failure, peak_memory, prepare, random_images, spoken_size

_logger = logging.getLogger(__name__)

COLUMNS = {
    "model": "",
    "mode": "",
    "px": "",
    "batch": "d",
    "parameters": ",d",
    "GMACs": ".2f",
    "images/s": ".4g",
    "spread, %": ".1f",
    "ratio": ".3f",
    "peak GiB": ".2f",
}
NOTES = [
    "GMACs: of one image, the algorithm's; 1 MAC = 2 FLOPs. Both they and the parameters are the model's before "
    "--reparameterize. images/s: median over the rounds; spread: (slowest - fastest round) / median.",
    "ratio: speed over that of the first model of the group, as the median over pairs of turns; above 1 is faster.",
    "peak GiB: of a process that runs this model alone, beyond the interpreter and its libraries (with --compile also "
    "the compiler's; on CUDA the allocator's).",
]


COMPILED = 8  # torch's recompile_limit: beyond it models would run eagerly, and only a warning would say so


def table(models: Sequence[str], works: Sequence[Workload], group: int, rounds: int, seconds: float) -> Table:
    """Speed and memory of models, each compared with the first of its group.

    Args:
        models: names, with arguments after commas.
        works: all done for every group.
        group: models at a time.
        rounds, seconds: of `timing.interleave`.

    Raises:
        ValueError: a model that cannot be built, or cannot do the work. What does not fit into memory is a note.
    """
    result = Table("Throughput", COLUMNS, notes=list(NOTES))
    check(models, works, group)
    with interruptible(result):
        for work in works:
            for start in range(0, len(models), group):
                rows, notes = compare(models[start : start + group], work, rounds, seconds)
                result.rows += rows
                result.notes = list(dict.fromkeys([*result.notes, *notes]))
    return result


def check(models: Sequence[str], works: Sequence[Workload], group: int) -> None:
    """Refuse what cannot be built or compiled, before an hour of measurements."""
    if group > COMPILED and any(work.compile for work in works):
        raise ValueError(f"torch.compile keeps {COMPILED} versions of a network at a time; compare --group {COMPILED}")
    for spec in models:
        for img_size in {work.img_size for work in works}:
            with torch.device("meta"):
                build.from_spec(spec, img_size)


def compare(
    models: Sequence[str], work: Workload, rounds: int, seconds: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row with COLUMNS per model, and what is to be said about them."""
    _logger.info("%s: %s", work, " ".join(models))
    torch.compiler.reset()  # or the shapes of the last ones would make these ones dynamic
    what = {"mode": work.mode, "px": spoken_size(work.img_size), "batch": work.batch}
    rows: list[dict[str, Any]] = [{"model": spec} | what for spec in models]
    notes = []
    try:
        for spec, row in zip(models, rows, strict=True):
            row["parameters"], gmacs, note = _counted(spec, work)
            row |= {} if gmacs is None else {"GMACs": gmacs}
            notes += [note] if note else []
            row["peak GiB"] = peak_memory(spec, work) / 2**30
        _time(models, work, rounds, seconds, rows)
    except DoesNotFitError as error:
        notes.append(f"{error}; {' and '.join(models)} were not timed.")
    return rows, notes


def _time(models: Sequence[str], work: Workload, rounds: int, seconds: float, rows: list[dict[str, Any]]) -> None:
    try:
        steps = [prepare(spec, work) for spec in models]
        timings = interleave(steps, torch.device(work.device), rounds, seconds)
    except RuntimeError as error:
        raise failure(" and ".join(models), work, error) from error
    for row, timing in zip(rows, timings, strict=True):
        row |= speed(work.batch, timing)


def speed(batch: int, timing: Timing) -> dict[str, Any]:
    """What a row says of the time of a step."""
    return {
        "images/s": batch / timing.median,
        "spread, %": 100 * timing.spread,
        "ratio": timing.ratio,
        "seconds": timing.by_round,
    }


def _counted(spec: str, work: Workload) -> tuple[int, float | None, str]:
    """Parameters, GMACs of an image, and why these are not known, where they are not."""
    try:
        return _counted_at(spec, work.img_size)
    except RuntimeError as error:
        raise failure(spec, work, error) from error


@functools.cache
def _counted_at(spec: str, img_size: tuple[int, int]) -> tuple[int, float | None, str]:
    model = build.from_spec(spec, img_size)
    try:
        found = flops.count(model, random_images(model, 1, img_size))
    except flops.UncountedError as error:
        return flops.num_parameters(model), None, f"GMACs of {spec} are not known: {error}."
    total = found.total()
    return total.parameters, total.macs / 1e9, ""
