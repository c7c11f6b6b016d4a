"""PNG files: matplotlib without its process-wide state, and a file that is whole or not there."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from .files import write_whole

COLOURS = ("#d95f02", "#1f77b4", "#2ca02c", "#7b4ab8", "#8c564b", "#555555")


def check(path: Path) -> None:
    """Refuse what would fail after the work of a picture is done: no matplotlib, no PNG, no folder to write to.

    Raises:
        ValueError: one of them.
    """
    new(1, 1)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{str(path)!r} cannot be a picture: pictures are PNG files; name it {path.stem}.png")
    if (path.exists() and not path.is_file()) or not path.resolve().parent.is_dir():
        raise ValueError(f"{str(path)!r} cannot be a picture: name a file in a folder that is there")


def new(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, 100 dots each.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, whose figures and backend belong to the whole process
    except ImportError as error:
        raise ValueError("pictures need the package matplotlib: pip install 'sgconvnext[viz]'") from error
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def plain(axes: Any, title: str, x: str, y: str) -> None:
    """Headings, a pale grid, and no frame."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: Path) -> None:
    """Write a PNG of at most 256 colours, a third of the size, replacing the file as a whole."""
    full, png = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png")
    palette = Image.open(full).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette.save(png, format="png", optimize=True)
    write_whole(path.resolve(), png.getvalue())  # what a link points to, not the link
