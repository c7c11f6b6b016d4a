"""Pathfinder (Linsley et al. 2018; Long Range Arena, section 2.5): are two circles joined by one dashed path?

Every picture has two long paths of dashes, shorter ones that distract, and two circles on ends of long paths. The
class is "same" where both circles lie on one path, else "different". The space between two paths is twice that between
the dashes of one, so that the eye can follow a path. A picture's paths are drawn before its class is known (`paths`).

    python -m sgconvnext.training.sequences.pathfinder data/pathfinder --size 64 --path-length 9

writes folders of classes, for models of images: data/pathfinder/train/different/0.png and so on.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from ... import console
from ...errors import DataError
from .paths import RADIUS, THICKNESS, Geometry, layout
from .streams import LARGEST, check_index, check_split, check_whole, stream

PROGRAM = "sgconvnext.training.sequences.pathfinder"
CLASSES = {"different": 0, "same": 1}
SPLITS = {"train": 0.8, "val": 0.9, "test": 1.0}  # where each ends in Long Range Arena's files, once shuffled

TRIES = 3  # to draw a picture; near the limit of what fits one in a hundred fails
SCALE = 4  # a pixel's side in pixels of the drawing that is reduced to the picture


def draw(geometry: Geometry, target: int, size: int, dash: float) -> Image.Image:
    """The grey picture of one class: white dashes and circles on black, of size x size pixels; a dash's in pixels."""
    image = Image.new("L", (size * SCALE, size * SCALE))
    pen, unit = ImageDraw.Draw(image), dash * SCALE
    for line in np.concatenate(geometry.paths) * unit:
        pen.line(line.tolist(), fill=255, width=round(THICKNESS * unit))
    for x, y in geometry.circles[target] * unit:
        reach = RADIUS * unit
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=255)
    return image.reduce(SCALE)


class Pathfinder(Dataset[tuple[Image.Image, int]]):
    """Pictures made on the spot: picture i depends on (seed, train, i) alone, and no two splits share a stream.

    What guesses the class without following a path, in percent of 1,200 to 1,500 pictures held out, with a path_length
    of 6, 9 and 14: ink, number of connected parts and distance of the circles 53, 50 and 52; with the circles' places
    relative to the border 62, 61 and 53; the directions of both paths' first dashes 68, 59 and 52, of their first
    three 93, 73 and 55. Three dashes are half of a path of 6: only with longer paths has one to follow them.

    Args:
        train: the training pictures, or those held out.
        samples: how many; of two successive ones, 2j and 2j + 1, one is of each class.
        size: side in pixels.
        path_length: dashes of each long path; of a distractor a third as many, but at least 2.
        distractors: how many.
        dash: length in pixels; size / 16 if None. Lines and circles scale with it.
        gap: between the dashes of a path, in pixels; dash / 2 if None.
        curvature: the greatest turn between two dashes, in degrees.
        seed: of all pictures.

    Attributes:
        targets: the class of each picture, 1 for "same".
        class_to_idx: {"different": 0, "same": 1}.

    Raises:
        ValueError: an argument is out of range, or paths do not fit; for the first picture at once, for a later one
            when it is made.
    """

    def __init__(
        self,
        train: bool,
        samples: int,
        size: int = 32,
        path_length: int = 6,
        distractors: int = 5,
        *,
        dash: float | None = None,
        gap: float | None = None,
        curvature: float = 60.0,
        seed: int = 0,
    ) -> None:
        check_split(train, samples, seed)
        check_whole("size", size, 32, 256)
        check_whole("path_length", path_length, 3, 1000)
        check_whole("distractors", distractors, 0, 1000)
        self.dash = size / 16 if dash is None else dash
        _check_range("dash", self.dash, 2.0, size / 8)
        self.gap = self.dash / 2 if gap is None else gap
        _check_range("gap", self.gap, self.dash / 4, self.dash)
        _check_range("curvature", curvature, 0.0, 90.0)
        self.train, self.samples, self.size, self.seed = train, samples, size, seed
        self.path_length, self.distractors, self.curvature = path_length, distractors, curvature
        firsts = stream(seed, train, LARGEST).integers(2, size=(samples + 1) // 2)
        self.targets: list[int] = np.stack([firsts, 1 - firsts], axis=1).ravel()[:samples].tolist()
        self.class_to_idx = dict(CLASSES)
        self[0]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """A grey picture (mode L) and its class."""
        check_index(index, self.samples)
        target = self.targets[index]
        return draw(self.geometry(index), target, self.size, self.dash), target

    def geometry(self, index: int) -> Geometry:
        """What picture i shows, in either class.

        Raises:
            DataError: no room was found for the paths.
        """
        rng, turn = stream(self.seed, self.train, index), math.radians(self.curvature)
        field, gap = self.size / self.dash, self.gap / self.dash
        layouts = (layout(rng, field, gap, self.path_length, self.distractors, turn) for _ in range(TRIES))
        found = next((each for each in layouts if each is not None), None)
        if found is None:
            raise DataError(
                f"no room for 2 paths of path_length={self.path_length} and distractors={self.distractors} in a "
                f"picture of size={self.size} with dash={self.dash:g}, gap={self.gap:g} and "
                f"curvature={self.curvature:g}: ask for fewer or shorter paths, shorter dashes or more curvature"
            )
        return found


def _check_range(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{name}={value!r} must be a number of {least:g} to {most:g}")


class LraPathfinder(Dataset[tuple[Image.Image, int]]):
    """Pictures of Long Range Arena's own Pathfinder, of one difficulty: a folder such as curv_contour_length_14.

    It holds imgs/N/sample_K.png, and metadata/N.npy, which in spite of its name is text: a picture a line, with the
    folder, the file's name, a number and the class, and more after them. The files tell no splits; here the pictures
    are shuffled, always alike, and the first 80 % are for training, 10 % for validation and 10 % for the test.

    Args:
        root: the folder, for instance lra_release/pathfinder32/curv_contour_length_14.
        split: train, val or test.

    Raises:
        ValueError: there is no such metadata, or one of its lines is not of that form; with its number.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
        self.root = Path(root)
        files = sorted(self.root.glob("metadata/*.npy"), key=lambda file: (len(file.name), file.name))
        found = [row for file in files for row in self._rows(file)]
        if not found:
            raise ValueError(
                f"{self.root}: holds no metadata/N.npy with pictures; name a folder such as "
                "lra_release/pathfinder32/curv_contour_length_14"
            )
        bounds = [0, *(round(share * len(found)) for share in SPLITS.values())]
        place = list(SPLITS).index(split)
        order = np.random.default_rng(0).permutation(len(found))[bounds[place] : bounds[place + 1]]
        self.samples = [found[i] for i in order]
        self.targets = [target for _, target in self.samples]
        self.class_to_idx = dict(CLASSES)

    def _rows(self, file: Path) -> list[tuple[Path, int]]:
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror}); get the files once more") from error
        rows = []
        for number, line in enumerate(lines, start=1):
            folder, name, _, target, *_ = [*line.split(), "", "", "", ""]
            if target not in ("0", "1"):
                raise ValueError(
                    f"{file}:{number}: {line[:60]!r} must be a folder, a file, a number and the class, 0 or 1"
                )
            rows.append((self.root / folder / name, int(target)))
        return rows

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """A grey picture (mode L) and its class; the published files have one that is empty, which is refused."""
        check_index(index, len(self))
        file, target = self.samples[index]
        try:
            with Image.open(file) as image:
                return image.convert("L"), target
        except OSError as error:
            raise ValueError(f"{file}: cannot be read as a picture; get the file once more") from error


def write_image_folder(folder: str | os.PathLike[str], train: int, val: int, **options: Any) -> None:
    """Write folder/train/different/0.png and so on, and folder/val.

    Args:
        folder: made if it is not there.
        train: how many pictures for training.
        val: how many are held out.
        options: of `Pathfinder`.

    Raises:
        ValueError: the folder holds something, or cannot be written; or `Pathfinder` refuses.
    """
    place = Path(folder)
    splits = {"train": Pathfinder(True, train, **options), "val": Pathfinder(False, val, **options)}
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ValueError(f"{str(place)!r} is not an empty folder; name another, or empty it")
        for name, pictures in splits.items():
            for kind in CLASSES:
                (place / name / kind).mkdir(parents=True)
            names = {target: kind for kind, target in CLASSES.items()}
            for index in range(len(pictures)):
                image, target = pictures[index]
                image.save(place / name / names[target] / f"{index}.png")
    except OSError as error:
        raise ValueError(f"folder {str(place)!r} cannot be written ({error.strerror}); name another") from error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", metavar="FOLDER", type=console.path, help="to write; it must be empty or not there")
    parser.add_argument("--train", type=console.count, default=20_000, metavar="N", help="training pictures (20000)")
    parser.add_argument("--val", type=console.count, default=2000, metavar="N", help="pictures held out (2000)")
    parser.add_argument("--size", type=int, default=32, metavar="PX", help="side of a picture (32)")
    parser.add_argument("--path-length", type=int, default=6, metavar="N", help="dashes of a long path (6)")
    parser.add_argument("--distractors", type=int, default=5, metavar="N", help="short paths (5)")
    parser.add_argument("--dash", type=float, metavar="PX", help="length of a dash (size / 16)")
    parser.add_argument("--gap", type=float, metavar="PX", help="between dashes of a path (half a dash)")
    parser.add_argument("--curvature", type=float, default=60.0, metavar="DEGREES", help="greatest turn (60)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all pictures (0)")
    return parser.parse_args()


def main() -> None:
    """Write the folders that the command line asks for."""
    options = vars(parse_args())
    with console.interruptible():
        try:
            write_image_folder(**options)
        except ValueError as error:
            console.fail(PROGRAM, error)
    console.tell(
        PROGRAM, f"{options['train']} pictures for training and {options['val']} held out: {options['folder']}\n"
    )


if __name__ == "__main__":
    main()
