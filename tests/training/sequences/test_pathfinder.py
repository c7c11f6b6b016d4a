"""Pathfinder: classes found again in the pictures, no statistic that gives them away, folders, and refusals."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import refused
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.datasets import ImageFolder

from sgconvnext.training.sequences import pathfinder
from sgconvnext.training.sequences.pathfinder import LraPathfinder, Pathfinder, draw, write_image_folder

KINDS = [{}, {"path_length": 9}, {"path_length": 14}, {"path_length": 20, "size": 256, "dash": 8.0, "distractors": 10}]


def within(radius: float) -> np.ndarray[Any, Any]:
    reach = math.ceil(radius)
    row, column = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    found: np.ndarray[Any, Any] = row**2 + column**2 <= radius**2
    return found


def joined(image: Image.Image, dash: float) -> bool:
    """Whether the circles lie on one path, from the pixels alone: dashes that almost touch are one path."""
    ink = np.asarray(image) > 127
    discs, count = ndimage.label(ndimage.binary_opening(ink, within(0.5 * dash)))  # wider than a dash's line
    assert count == 2
    lines = ink & ~ndimage.binary_dilation(discs > 0, within(0.15 * dash))
    paths, _ = ndimage.label(ndimage.binary_dilation(lines, within(0.32 * dash)))  # gaps are 0.5, between paths 1
    near = ndimage.distance_transform_edt(~lines, return_distances=False, return_indices=True)
    ends = []
    for disc in (1, 2):
        places = np.argwhere(discs == disc).T
        at = near[:, places[0], places[1]]  # the nearest ink of each pixel of the disc
        distances = np.hypot(*(at - places))
        ends.append(paths[tuple(at[:, distances.argmin()])])
    return bool(ends[0] == ends[1])


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_class_is_found_again_by_filling_the_paths(options: dict[str, Any]) -> None:
    made = Pathfinder(True, 20, **({"size": 128} | options))
    for i in range(20):
        geometry = made.geometry(i)
        for target in (0, 1):
            assert joined(draw(geometry, target, made.size, made.dash), made.dash) == bool(target), (i, target)
        image, target = made[i]
        assert (image.mode, image.size) == ("L", (made.size, made.size))
        assert np.array_equal(image, draw(geometry, target, made.size, made.dash))


def test_paths_keep_clear_of_each_other_and_of_the_border() -> None:
    made = Pathfinder(True, 20, path_length=14)
    along = np.linspace(0, 1, 9)[:, None]
    for i in range(20):
        geometry = made.geometry(i)
        assert [len(path) for path in geometry.paths] == [14, 14, 4, 4, 4, 4, 4]
        points = [
            np.concatenate([line[:2] * (1 - along) + line[2:] * along for line in path]) for path in geometry.paths
        ]
        for one, other in itertools.combinations(points, 2):
            apart = np.hypot(*(one[:, None] - other[None]).transpose(2, 0, 1)).min()
            assert apart > 0.375 + 2 * 0.5 - 0.15  # a line's thickness, twice the gap, less a cell of the map
        reach = np.concatenate([*points, *geometry.circles])
        assert reach.min() >= 0.7  # dashes, of a circle's radius of 0.75
        assert reach.max() <= 15.3


def test_dashes_of_a_path_follow_each_other() -> None:
    made = Pathfinder(True, 5, 64, path_length=9, gap=1.5, curvature=30)
    for path in (path for i in range(5) for path in made.geometry(i).paths):
        dashes, steps = path[:, 2:] - path[:, :2], path[1:, :2] - path[:-1, 2:]
        assert np.allclose(np.hypot(*dashes.T), 1)
        assert np.allclose(np.hypot(*steps.T), 1.5 / made.dash)
        turns = np.diff(np.unwrap(np.arctan2(dashes[:, 1], dashes[:, 0])))
        assert np.abs(turns).max() <= math.radians(30) + 1e-9


def statistics(image: Image.Image, circles: np.ndarray[Any, Any]) -> list[float]:
    """Ink, connected parts, distance of the circles, and of each of them from the border."""
    pixels = np.asarray(image) / 255
    border = sorted(np.minimum(circles, 16 - circles).min(axis=1))
    return [pixels.sum(), ndimage.label(pixels > 0.5)[1], math.dist(*circles), *border]


def test_statistics_do_not_tell_the_class() -> None:
    made = Pathfinder(True, 800)
    found, distances = [], {0: [], 1: []}
    for i, target in enumerate(made.targets):
        geometry = made.geometry(i)
        circles = geometry.circles
        found.append(statistics(draw(geometry, target, 32, 2.0), circles[target]))
        for kind in (0, 1):
            distances[kind].append(math.dist(*circles[kind]))
    features = np.array(found)
    for columns in ([0], [1], [2], [0, 1, 2]):
        model = make_pipeline(StandardScaler(), LogisticRegression())
        model.fit(features[:400, columns], made.targets[:400])
        assert 0.4 < model.score(features[400:, columns], made.targets[400:]) < 0.6  # 4 standard deviations
    assert np.abs(np.subtract(distances[0], distances[1])).max() <= 0.5
    assert abs(np.mean(distances[0]) - np.mean(distances[1])) < 0.05


def test_picture_is_the_same_one_at_every_size() -> None:
    small, large = Pathfinder(True, 4, 32), Pathfinder(True, 4, 128)
    for i in range(4):
        reduced = np.asarray(large[i][0].reduce(4), float)
        assert np.abs(np.asarray(small[i][0], float) - reduced).mean() < 6
        assert np.abs(np.asarray(small[1 - i % 2][0], float) - reduced).mean() > 20 or i < 2


def test_picture_depends_on_seed_split_and_index_alone() -> None:
    some, more = Pathfinder(True, 5, seed=3), Pathfinder(True, 40, seed=3)
    np.random.rand(3)
    for i in (4, 0, 2):
        assert np.array_equal(some[i][0], more[i][0])
    assert some.targets == more.targets[:5]
    others = [Pathfinder(train, 10, seed=seed) for train in (True, False) for seed in (3, 4)]
    assert len({image.tobytes() for each in others for image, _ in each}) == 40  # type: ignore[attr-defined]


def test_classes_are_balanced_and_in_no_order() -> None:
    targets = Pathfinder(True, 1000).targets
    assert sum(targets) == 500
    assert sum(Pathfinder(True, 7).targets) in (3, 4)
    assert 200 < sum(targets[::2]) < 300
    assert targets != Pathfinder(False, 1000).targets


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path_length": 60}, ["size=32", "path_length=60", "distractors=5", "fewer or shorter"]),
        ({"distractors": 200}, ["size=32", "path_length=6", "distractors=200"]),
        ({"train": "train"}, ["train='train'"]),
        ({"samples": 0}, ["samples=0"]),
        ({"size": 16}, ["size=16", "32"]),
        ({"size": 32.5}, ["size=32.5"]),
        ({"path_length": 1}, ["path_length=1"]),
        ({"distractors": -1}, ["distractors=-1"]),
        ({"dash": 1}, ["dash=1", "2 to 4"]),
        ({"dash": math.nan}, ["dash=nan"]),
        ({"gap": 5.0}, ["gap=5.0", "0.5 to 2"]),
        ({"curvature": 100}, ["curvature=100"]),
        ({"seed": -1}, ["seed=-1"]),
    ],
)
def test_odd_arguments_are_refused(options: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder, "TRIES", 1)
    with refused(*words):
        Pathfinder(**({"train": True, "samples": 4} | options))


# ---- folders


def test_written_folders_hold_the_pictures(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "new" / "out", train=6, val=4, size=64, seed=1)
    for split, train, samples in (("train", True, 6), ("val", False, 4)):
        read = ImageFolder(str(tmp_path / "new" / "out" / split))
        made = Pathfinder(train, samples, 64, seed=1)
        assert read.class_to_idx == made.class_to_idx
        assert len(read) == samples
        for path, target in read.samples:
            image, want = made[int(Path(path).stem)]
            assert target == want
            assert np.array_equal(Image.open(path), image)


def test_folder_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with refused(str(tmp_path), "not an empty folder", "name another"):
        write_image_folder(tmp_path, 2, 2)
    with refused("not an empty folder"):
        write_image_folder(tmp_path / "mine.txt", 2, 2)
    with refused("cannot be written"):
        write_image_folder(tmp_path / "mine.txt" / "out", 2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_command_writes_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pathfinder", str(tmp_path / "out"), "--train=3", "--val=2", "--path-length=9", "--dash=2", "--gap=1"]
    monkeypatch.setattr("sys.argv", command)
    pathfinder.main()
    assert "3 pictures for training and 2 held out" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*.png"))) == 5
    with pytest.raises(SystemExit, match=r"^2$"):
        pathfinder.main()
    assert capsys.readouterr().err.splitlines()[0].endswith("is not an empty folder; name another, or empty it")


# ---- Long Range Arena's files


def lra(root: Path, pictures: int = 20) -> Path:
    """A folder in the published layout; the grey of a picture is its number, which is odd in class 1."""
    (root / "metadata").mkdir(parents=True)
    for batch in (0, 1):
        (root / "imgs" / str(batch)).mkdir(parents=True)
        lines = []
        for k in range(pictures // 2):
            number = batch * (pictures // 2) + k
            Image.new("L", (32, 32), number).save(root / "imgs" / str(batch) / f"sample_{k}.png")
            lines.append(f"imgs/{batch} sample_{k}.png {k} {number % 2} 2 4 0.75 7 6 2 0.5 2 1.0\n")
        (root / "metadata" / f"{batch}.npy").write_text("".join(lines))
    return root


def test_published_layout_is_read_and_split(tmp_path: Path) -> None:
    splits = {name: LraPathfinder(lra(tmp_path) if name == "train" else tmp_path, name) for name in pathfinder.SPLITS}
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "val": 2, "test": 2}
    numbers = []
    for split in splits.values():
        for i in range(len(split)):
            image, target = split[i]
            numbers.append(image.getpixel((0, 0)))
            assert image.mode == "L"
            assert target == split.targets[i] == numbers[-1] % 2
    assert sorted(numbers) == list(range(20))
    assert numbers != sorted(numbers)
    assert splits["train"].samples == LraPathfinder(tmp_path, "train").samples


def test_odd_published_files_are_refused(tmp_path: Path) -> None:
    with refused("split='valid'", "train, val, test"):
        LraPathfinder(tmp_path, "valid")
    with refused(str(tmp_path), "metadata", "curv_contour_length_14"):
        LraPathfinder(tmp_path, "train")
    root = lra(tmp_path / "curv_baseline")
    (root / "imgs" / "0" / "sample_3.png").write_bytes(b"")
    split = LraPathfinder(root, "train")
    with refused("sample_3.png", "cannot be read"):
        _ = [split[i] for i in range(len(split))]
    for line in ("imgs/0 sample_0.png 0 2 1", "imgs/0 sample_0.png", "", "\x93NUMPY"):
        (root / "metadata" / "1.npy").write_text(f"imgs/1 sample_0.png 0 1 2\n{line}\n")
        with refused("1.npy:2", "class"):
            LraPathfinder(root, "train")
