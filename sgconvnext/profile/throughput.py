"""Models side by side: speed in interleaved rounds, and peak memory."""

import functools
import gc
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..training import build
from . import flops
from .memory import failure
from .session import Session
from .table import Table
from .timing import RATIO, Step, Timing
from .workload import Workload, peak_memory, prepare, random_images, spoken_size

Row = dict[str, Any]

_logger = logging.getLogger(__name__)

COLUMNS = {"model": "", "run": "", "mode": "", "px": "", "batch": "d", "parameters": ",d", "GMACs": ".2f"}
COLUMNS |= {"images/s": ".4g", "spread, %": ".1f", "ratio": ".3f", "peak GiB": ".2f"}
NOTES = [
    "run: eager; compiled by torch.compile; after timm's reparameterize_model; in channels-last memory format. GMACs: "
    "of an image, the algorithm's; 1 MAC = 2 FLOPs. They and the parameters are the model's before it is "
    "reparameterized.",
    "images/s: median over the rounds; spread: (slowest - fastest round) / median. ratio: how many times as fast as "
    f"the first row of the group. {RATIO}",
    "peak GiB: of a process that runs this model alone, beyond the interpreter and its libraries (compiled, also the "
    "compiler's; on CUDA the allocator's).",
]
COMPILED = 8  # torch's recompile_limit: beyond it models would run eagerly, and only a warning would say so


def tables(
    models: Sequence[str], comparisons: Sequence[Sequence[Workload]], group: int, session: Session
) -> list[Table]:
    """Speed and memory of models, compared with the first of their group; run in several ways, also the best of each.

    Args:
        models: names, with arguments after commas.
        comparisons: the same work run in one way or more; all are done for every group.
        group: models at a time.
        session: rounds and time.

    Raises:
        ValueError: a model that cannot be built. What fails later, or does not fit into memory, is a note.
    """
    result = Table("Throughput", COLUMNS, notes=list(NOTES))
    best = Table(
        "The fastest run of each model", COLUMNS, notes=["ratio: as above, over the first model's fastest run."]
    )
    check(models, comparisons, group)
    for works in comparisons:
        for start in range(0, len(models), group):
            specs = models[start : start + group]
            work = replace(works[0], compile=False, reparameterize=False, channels_last=False)
            what = f"{work} of {' and '.join(specs)}"
            session.attempt(what, functools.partial(compare, what, specs, works, session, result, best))
    return [result, best] if best.rows else [result]


def check(models: Sequence[str], comparisons: Sequence[Sequence[Workload]], group: int) -> None:
    """Refuse what cannot be built or compiled, before an hour of measurements."""
    compiled = max(sum(work.compile for work in works) for works in comparisons)
    if compiled * group > COMPILED:
        raise ValueError(
            f"torch.compile keeps {COMPILED} versions of a network at a time; compare --group {COMPILED // compiled}"
        )
    for spec, img_size in itertools.product(models, {work.img_size for works in comparisons for work in works}):
        with torch.device("meta"):
            build.from_spec(spec, img_size)


def compare(
    what: str, specs: Sequence[str], works: Sequence[Workload], session: Session, result: Table, best: Table
) -> None:
    """Add a row with COLUMNS per model and run to a table, and the fastest run of each model to another."""
    _logger.info("%s", what)
    torch.compiler.reset()  # or the shapes of the last ones would make these ones dynamic
    gc.collect()
    rows: list[Row] = []
    ready: list[tuple[Row, Step]] = []
    for spec, work in itertools.product(specs, works):
        row = {"model": spec, "run": work.run, "mode": work.mode, "px": spoken_size(work.img_size)}
        rows.append(row | {"batch": work.batch})
        session.attempt(f"{spec}, {work}", functools.partial(_prepare, spec, work, rows[-1], ready, result.notes))
    if ready:
        device = torch.device(works[0].device)
        session.attempt(f"turns of {what}", lambda: _time(what, ready, device, session, rows, best), begun=True)
    result.rows += [row for row in rows if "parameters" in row]


def _prepare(spec: str, work: Workload, row: Row, ready: list[tuple[Row, Step]], notes: list[str]) -> None:
    """Count a model, measure its memory, and run its first step."""
    try:
        row["parameters"], gmacs, note = _counted(spec, work.img_size)
        row |= {} if gmacs is None else {"GMACs": gmacs}
        if note and note not in notes:
            notes.append(note)
        row["peak GiB"] = peak_memory(spec, work) / 2**30
        step = prepare(spec, work)
        step()  # it may compile for minutes, after which the session looks at the clock
    except RuntimeError as error:
        raise failure(f"{spec}, {work}", error) from error
    ready.append((row, step))


def _time(
    what: str, ready: list[tuple[Row, Step]], device: torch.device, session: Session, rows: list[Row], best: Table
) -> None:
    """Time in turns what is ready. There is no ratio where the first model and run is not."""
    timings = session.time(what, [step for _, step in ready], device)
    timed = [(row, timing) for (row, _), timing in zip(ready, timings, strict=True)]
    for row, timing in timed:
        row |= _speed(row["batch"], timing) | ({"ratio": timing.ratio} if ready[0][0] is rows[0] else {})
    if len({row["run"] for row in rows}) == 1:
        return
    fastest: dict[str, tuple[Row, Timing]] = {}
    for row, timing in sorted(timed, key=lambda pair: pair[1].median):
        fastest.setdefault(row["model"], (row, timing))
    for model in dict.fromkeys(row["model"] for row, _ in timed):
        row, own = fastest[model]
        first = fastest.get(rows[0]["model"])
        best.rows.append(row | {"ratio": Timing(own.rounds, first[1].rounds).ratio if first else None})


def _speed(batch: int, timing: Timing) -> Row:
    return {"images/s": batch / timing.median, "spread, %": 100 * timing.spread, "seconds": timing.by_round}


@functools.cache
def _counted(spec: str, img_size: tuple[int, int]) -> tuple[int, float | None, str]:
    """Parameters, GMACs of an image, and why these are not known, where they are not."""
    model = build.from_spec(spec, img_size)
    try:
        found = flops.count(model, random_images(model, 1, img_size))
    except flops.UncountedError as error:
        return flops.num_parameters(model), None, f"GMACs of {spec} are not known: {error}."
    total = found.total()
    return total.parameters, total.macs / 1e9, ""
