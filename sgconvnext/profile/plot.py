"""The charts of the paper's Figure 5: throughput against FLOPs, and accuracy against both where it is known."""

import csv
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import figure

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One chart: a line per family of models, a point per model."""

    title: str
    x: str
    y: str
    rows: Rows
    point: Callable[[dict[str, Any]], tuple[float, float]]


def read_accuracies(path: Path, models: Sequence[str]) -> dict[str, float]:
    """Top-1 in percent by model, out of a CSV file with columns model and top1, as timm's results files have.

    Raises:
        ValueError: no such file, another one, or one without any of the models.
    """
    try:
        with path.open(newline="") as file:
            header, *rows = csv.reader(line for line in file if not line.startswith("#"))
        model, top1 = header.index("model"), header.index("top1")
        found = {row[model]: float(row[top1]) for row in rows if row and row[model] in models}
    except OSError as error:
        raise ValueError(f"--accuracy {str(path)!r} cannot be read ({error.strerror})") from error
    except (ValueError, IndexError, csv.Error) as error:
        raise ValueError(f"--accuracy {str(path)!r} must be a CSV file with the columns model and top1") from error
    if not found:
        raise ValueError(f"--accuracy {str(path)!r} has none of the models: {', '.join(models)}")
    return found


def draw(rows: Rows, accuracies: dict[str, float], path: Path) -> None:
    """Draw the rows of a throughput table that have FLOPs and a speed.

    Args:
        rows: as `throughput.tables` makes them.
        accuracies: top-1 in percent by model; empty for none.
        path: of the PNG.

    Raises:
        ValueError: matplotlib is missing, or there is nothing to draw.
    """
    kinds: defaultdict[str, Rows] = defaultdict(list)
    for row in rows:
        if "GMACs" in row and "images/s" in row:
            kinds[f"{row['mode']}, {row['px']} px, batch {row['batch']}"].append(row)
    if not kinds:
        raise ValueError("--plot: no model's FLOPs and speed are both known, so there is nothing to draw")
    panels = [
        Panel(kind, "GFLOPs an image", "images/s", of_kind, lambda row: (2 * row["GMACs"], row["images/s"]))
        for kind, of_kind in kinds.items()
    ]
    if accuracies:
        panels += _accuracy_panels(kinds, accuracies)
    picture = figure.new(5.2 * len(panels), 4.4)
    for axes, panel in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel)
    figure.save(picture, path)


def _accuracy_panels(kinds: dict[str, Rows], accuracies: dict[str, float]) -> list[Panel]:
    """Of the first kind of measurement."""
    kind, rows = next(iter(kinds.items()))
    rows = [row for row in rows if row["model"] in accuracies]
    return [
        Panel(
            f"accuracy, {kind}",
            x,
            "top-1, %",
            rows,
            lambda row, of_x=of_x: (of_x(row), accuracies[row["model"]]),  # type: ignore[misc]
        )
        for x, of_x in (("GFLOPs an image", lambda row: 2 * row["GMACs"]), ("images/s", lambda row: row["images/s"]))
    ]


def _draw_panel(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator

    families: defaultdict[str, Rows] = defaultdict(list)
    for row in panel.rows:
        families[_family_and_size(row["model"])[0]].append(row)
    # names of one family above its points, of the next below, so that close points stay readable
    places = itertools.cycle([((4, 4), "left"), ((-4, -11), "right")])
    styles = zip(itertools.cycle(figure.COLOURS), places, strict=False)
    for (family, rows), (colour, (offset, side)) in zip(families.items(), styles, strict=False):
        x, y = zip(*map(panel.point, rows), strict=True)
        axes.plot(x, y, color=colour, marker="o", markersize=4, label=family)
        for row, *at in zip(rows, x, y, strict=True):
            size = _family_and_size(row["model"])[1]
            axes.annotate(size, at, offset, textcoords="offset points", ha=side, color=colour, fontsize=8)
    figure.plain(axes, panel.title, panel.x, panel.y)
    for scale, axis, name in ((axes.set_xscale, axes.xaxis, panel.x), (axes.set_yscale, axes.yaxis, panel.y)):
        if not name.startswith("top-1"):
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    axes.legend(frameon=False, fontsize=9)


def _family_and_size(spec: str) -> tuple[str, str]:
    """``convnext`` and ``tiny``; timm's tag is left out, arguments belong to the family."""
    name, comma, arguments = spec.partition(",")
    family, _, size = name.partition(".")[0].rpartition("_")
    return (family or size) + comma + arguments, size
