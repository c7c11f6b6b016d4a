"""Where the metrics of a run go: metrics.jsonl and curves.png; TensorBoard and Weights & Biases where asked for."""

import json
import logging
import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import figure
from ..errors import one_line
from ..files import write_whole
from .config import Config, to_dict

_logger = logging.getLogger(__name__)

Metrics = dict[str, float]  # of one epoch, as `Run.evaluate` names them; "epoch" counts from 0


def score(metrics: Metrics) -> float:
    """Top-1 of the model or of its EMA, whichever is better; the epoch with the highest is the best."""
    return max(metrics["val_top1"], metrics.get("ema_top1", -math.inf))


class Watch:
    """All sinks of a run, on rank 0. One that fails is warned about, once, and does not end the run.

    Args:
        config: of the run; its folder ``out`` exists.
        history: epochs that are finished and will not be run again, out of the resumed checkpoint; [] for a new run.
            metrics.jsonl is rewritten from it, so that lines of epochs to be repeated are gone.

    Raises:
        ValueError: a package that is asked for is missing, or W&B refuses the account or the project.
    """

    def __init__(self, config: Config, history: list[Metrics]) -> None:
        out = Path(config.out)
        self.history = list(history)
        self.failed: set[str] = set()
        # how each takes in the last epoch of a history; the first holds all from which the others can be made again
        self.sinks: dict[str, Callable[[list[Metrics]], None]] = {"metrics.jsonl": partial(_write_lines, out)}
        self.closers: dict[str, Callable[[], None]] = {}
        self._attempt("metrics.jsonl", partial(_write_lines, out, self.history))
        if find_spec("matplotlib"):
            self.sinks["curves.png"] = lambda history: draw(history, out / "curves.png")
        if config.watch.tensorboard:
            self._open("tensorboard", partial(TensorBoard, out / "tensorboard", start=len(history)))
        if config.watch.wandb:
            self._open("wandb", partial(WandB, out, config))

    def epoch(self, metrics: Metrics) -> None:
        """Hand the metrics of a finished epoch to every sink."""
        self.history.append(metrics)
        for name, sink in self.sinks.items():
            self._attempt(name, partial(sink, self.history))

    def close(self) -> None:
        """Leave nothing unwritten."""
        for name, closer in self.closers.items():
            self._attempt(name, closer)

    def _open(self, name: str, create: "Callable[[], TensorBoard | WandB]") -> None:
        try:
            sink = create()
            self.sinks[name], self.closers[name] = sink.write, sink.close
        except ValueError:  # a mistake of the user, who is still there to read it
            raise
        except Exception as error:
            self._warn(name, error)

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a full disk, a lost network: the run is worth more than its pictures
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        if name not in self.failed:
            self.failed.add(name)
            _logger.warning("%s failed (%s); the run goes on, and this is said once", name, one_line(error))


def _write_lines(out: Path, history: list[Metrics]) -> None:
    """metrics.jsonl, one epoch a line. The file is replaced as a whole, so no kill or full disk leaves half a line."""
    write_whole(out / "metrics.jsonl", "".join(json.dumps(metrics) + "\n" for metrics in history).encode())


class TensorBoard:
    """Event files in a folder; ``start`` is the first epoch to come, from which on older events are hidden."""

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "watch.tensorboard=true needs the package tensorboard: pip install 'sgconvnext[watch]'"
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=start)

    def write(self, history: list[Metrics]) -> None:
        for key, value in _scalars(history[-1]).items():
            self.writer.add_scalar(key, value, int(history[-1]["epoch"]))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A W&B run in ``out``/wandb. Its id stays in ``out``/wandb_id, so that a resumed run is the same one there."""

    def __init__(self, out: Path, config: Config) -> None:
        project = config.watch.wandb
        try:  # by names, because any folder called wandb can be imported, as an empty package
            from wandb import UsageError, init
        except ImportError as error:
            raise ValueError(
                f"watch.wandb={project!r} needs the package wandb: pip install 'sgconvnext[watch]'"
            ) from error
        kept = out / "wandb_id"
        known = kept.read_text().strip() if kept.exists() else None
        try:
            self.run: Any = init(
                project=project,
                dir=str(out),
                name=out.resolve().name,
                config=to_dict(config),
                id=known,
                resume="allow",
            )
        except (UsageError, ValueError) as error:  # there is no account, or the project's name is refused
            raise ValueError(
                f"watch.wandb={project!r} is refused ({one_line(error)}); run wandb login, or set WANDB_MODE=offline"
            ) from error
        write_whole(kept, self.run.id.encode())

    def write(self, history: list[Metrics]) -> None:
        self.run.log(_scalars(history[-1]), step=int(history[-1]["epoch"]))

    def close(self) -> None:
        self.run.finish()


GREY, BLUE, ORANGE = "#555555", "#1f77b4", "#d95f02"

# Heading of a panel: the metrics in it, with their labels and colours
PANELS = {
    "loss": {"train_loss": ("training", GREY), "val_loss": ("validation", BLUE), "ema_loss": ("EMA", ORANGE)},
    "validation top-1, %": {"val_top1": ("model", BLUE), "ema_top1": ("EMA", ORANGE)},
    "learning rate": {"lr": ("", GREY)},
}


def draw(history: list[Metrics], path: Path) -> None:
    """Loss, top-1 and learning rate against the epoch, as a PNG named after the folder it is in.

    Args:
        history: at least one epoch.
        path: of the file, replaced as a whole.
    """
    picture = figure.new(11, 3.6)
    panels = picture.subplots(1, len(PANELS), width_ratios=[4, 4, 2])
    for panel, heading in zip(panels, PANELS, strict=True):
        _draw_panel(panel, heading, history)
    picture.suptitle(f"{path.resolve().parent.name}: {_best(history)}", parse_math=False)
    figure.save(picture, path)


def _draw_panel(panel: Any, heading: str, history: list[Metrics]) -> None:
    from matplotlib.ticker import MaxNLocator

    ends = []
    for key, (label, colour) in PANELS[heading].items():
        points = [(line["epoch"], line[key]) for line in history if math.isfinite(line.get(key, math.nan))]
        if points:
            marker = "o" if len(points) <= 20 else ""  # one epoch has no line
            panel.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, clip_on=False)
            ends.append((points[-1][1], f"{label} {points[-1][1]:.4g}".strip(), colour))
    figure.plain(panel, heading, "epoch", "")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    first, last = history[0]["epoch"], history[-1]["epoch"]
    panel.set_xlim((first, last) if first < last else (first - 0.5, last + 0.5))
    _label_ends(panel, ends)


def _label_ends(panel: Any, ends: list[tuple[float, str, str]]) -> None:
    """Write each line's name and last value to its right, no two closer than a line of text."""
    low, high = panel.get_ylim()
    above = -1.0
    for value, text, colour in sorted(ends):
        height = max((value - low) / (high - low), above + 0.07)  # share of the panel's height
        panel.text(1.04, height, text, color=colour, transform=panel.transAxes, va="center", fontsize=9)
        above = height


def _best(history: list[Metrics]) -> str:
    """``best top-1 98.61 % (EMA, epoch 11)``."""
    found = [
        (line[key], label, int(line["epoch"]))
        for line in history
        for key, (label, _) in PANELS["validation top-1, %"].items()
        if key in line
    ]
    top1, label, epoch = max(found, key=lambda item: item[0])
    return f"best top-1 {top1:.2f} % ({label}, epoch {epoch})"


def _scalars(metrics: Metrics) -> Metrics:
    return {key: value for key, value in metrics.items() if key != "epoch"}
