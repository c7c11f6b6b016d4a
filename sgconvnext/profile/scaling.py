"""Cost and memory of models against the resolution."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from . import throughput
from .session import Session
from .table import Table
from .workload import Workload, spoken_size


def table(models: Sequence[str], works: Sequence[Workload], session: Session) -> Table:
    """Speed and memory of all models together at every size, and how they grow over the last step.

    Args:
        models: as in `throughput.tables`.
        works: of one mode or more, from small to large.
        session: rounds and time.

    Raises:
        ValueError: as in `throughput.tables`.
    """
    result, *_ = throughput.tables(models, [[work] for work in works], len(models), session)
    result.title = "Cost against resolution"
    for mode, model in itertools.product(dict.fromkeys(work.mode for work in works), dict.fromkeys(models)):
        before, last = [work for work in works if work.mode == mode][-2:]
        rows = {row["px"]: row for row in result.rows if row["mode"] == mode and row["model"] == model}
        small, large = (rows.get(spoken_size(work.img_size)) for work in (before, last))
        if small is None or large is None:
            continue  # the session ended before
        growth = math.prod(last.img_size) / math.prod(before.img_size)
        result.notes.append(
            f"{model}, {mode}, {small['px']} to {large['px']} px: time grows as pixels^"
            f"{_power(growth, _time_of(small), _time_of(large))}, memory as pixels^"
            f"{_power(growth, small.get('peak GiB'), large.get('peak GiB'))}."
        )
    return result


def _time_of(row: dict[str, Any]) -> float | None:
    return 1 / row["images/s"] if "images/s" in row else None


def _power(growth: float, before: float | None, after: float | None) -> str:
    """p of after / before = growth^p, as text; unknown where one is not known, or nothing was measured."""
    return f"{math.log(after / before) / math.log(growth):.2f}" if before and after and growth != 1 else "?"
