"""Image files as they come: what is decoded to which pixels, what is left out, and what is told of either."""

import importlib.util
import io
import logging
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from training_helpers import micro_config, write_images

from sgconvnext import data, images
from sgconvnext.errors import DataError
from sgconvnext.images import FAULTS, UNREADABLE, Batch, Images, Sample, collate, collate_readable, decode

GREYS = np.arange(0, 256, 8, dtype=np.uint8).reshape(4, 8)
DEEP = np.array([[0, 255, 256, 257], [4095, 32768, 65279, 65535]], dtype=np.uint16)
COLOURS = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [255, 255, 255]], dtype=np.uint8)
INDICES = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes, upright: bool = False) -> tuple[NDArray[np.uint8], str]:
    """Pixels (H, W, 3) and the fault's name."""
    image, fault = decode(Image.open(io.BytesIO(content)), upright)
    assert image.mode == "RGB"
    return np.asarray(image), FAULTS[fault]


def grey(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(values[..., None], 3, axis=2)


def photo(size: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


# ---- pixels


def palette_image(**options: Any) -> bytes:
    image = Image.fromarray(INDICES).convert("P")
    image.putpalette(COLOURS.tobytes())
    image.putdata(INDICES.flatten().tolist())
    return encoded(image, "PNG", **options)


@pytest.mark.parametrize(
    "options", [{}, {"transparency": 2}, {"transparency": bytes([0, 128, 255, 7])}], ids=["opaque", "one", "each"]
)
def test_palette_is_looked_up_and_its_transparency_dropped(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own way to RGB warns of transparency that it cannot keep
        pixels, fault = decoded(palette_image(**options))
    assert fault == "palette"
    np.testing.assert_array_equal(pixels, COLOURS[INDICES])


def big_endian(values: NDArray[np.uint16]) -> Image.Image:
    return Image.frombytes("I;16B", (values.shape[1], values.shape[0]), values.astype(">u2").tobytes())


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(DEEP), "PNG"),
        encoded(Image.fromarray(DEEP), "TIFF"),
        encoded(big_endian(DEEP), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
    ],
    ids=["PNG", "TIFF", "big-endian TIFF", "mode I"],
)
def test_sixteen_bits_are_divided_by_256_and_not_clipped_to_white(content: bytes) -> None:
    pixels, fault = decoded(content)
    assert fault == "16-bit"
    np.testing.assert_array_equal(pixels, grey((DEEP // 256).astype(np.uint8)))


def test_integers_beyond_sixteen_bits_are_black_or_white() -> None:
    values = np.array([[-(2**31), -1, 65536, 2**31 - 1]], dtype=np.int32)
    image, fault = decode(Image.fromarray(values))
    assert FAULTS[fault] == "16-bit"
    np.testing.assert_array_equal(np.asarray(image)[..., 0], [[0, 0, 255, 255]])


def test_cmyk_is_inverted_ink() -> None:
    ink = (200, 100, 0, 51)
    pixels, fault = decoded(encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100))
    assert fault == "CMYK"
    want = [(255 - part) * (255 - ink[3]) / 255 for part in ink[:3]]
    assert np.abs(pixels - np.array(want)).max() <= 3


def with_alpha(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.dstack([values, np.resize(np.array([0, 99, 255], dtype=np.uint8), values.shape[:2])])


@pytest.mark.parametrize(
    ("image", "want"),
    [
        (Image.fromarray(GREYS > 100), grey(np.where(GREYS > 100, 255, 0).astype(np.uint8))),
        (Image.fromarray(GREYS), grey(GREYS)),
        (Image.fromarray(with_alpha(GREYS)), grey(GREYS)),
        (Image.fromarray(with_alpha(COLOURS[INDICES])), COLOURS[INDICES]),
        (Image.fromarray(COLOURS[INDICES]), COLOURS[INDICES]),
    ],
    ids=["1", "L", "LA", "RGBA", "RGB"],
)
def test_ordinary_modes_keep_their_pixels_and_are_no_fault(image: Image.Image, want: NDArray[np.uint8]) -> None:
    pixels, fault = decoded(encoded(image, "PNG"))
    assert fault == ""
    np.testing.assert_array_equal(pixels, want)


# what a viewer does for each orientation, in numpy's words
TURNS = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


def rotated(orientation: int) -> tuple[bytes, NDArray[np.uint8]]:
    """A JPEG of 2 x 3 flat blocks, which its quantisation hardly changes, and its pixels as stored."""
    blocks = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    pixels = blocks.repeat(8, axis=0).repeat(8, axis=1)
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    return encoded(Image.fromarray(pixels), "JPEG", quality=100, subsampling=0, exif=exif), pixels


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_turns_the_pixels_only_where_it_is_asked_to(orientation: int) -> None:
    content, stored = rotated(orientation)
    for upright, want in [(False, stored), (True, TURNS[orientation](stored))]:
        pixels, fault = decoded(content, upright)
        assert fault == "EXIF-rotated"
        assert pixels.shape == want.shape
        assert np.abs(pixels.astype(int) - want).max() <= 3


def test_upright_photograph_is_no_fault() -> None:
    content, stored = rotated(1)
    pixels, fault = decoded(content, upright=True)
    assert fault == ""
    assert np.abs(pixels.astype(int) - stored).max() <= 3


def test_very_large_image_is_decoded_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(photo(12), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    spec = importlib.util.find_spec("sgconvnext.images")
    assert spec is not None
    assert spec.loader is not None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again = importlib.util.module_from_spec(spec)  # pytest has undone what importing it the first time did
        spec.loader.exec_module(again)
        image, fault = again.decode(Image.open(io.BytesIO(content)))
    assert FAULTS[fault] == "very large"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(photo(12)))
    assert [str(warning.message) for warning in told] == []


# ---- datasets


def config_of(root: Path, **changes: Any) -> Any:
    plain = {"data.mean": [0.0, 0.0, 0.0], "data.std": [1.0, 1.0, 1.0], "model.num_classes": None}
    return micro_config(**(plain | {"data.dataset": "", "data.root": str(root)} | changes))


BROKEN = {
    "empty.jpg": b"",
    "truncated.jpg": encoded(photo(), "JPEG")[:-400],
    "truncated.png": encoded(photo(), "PNG")[:-2000],
    "beginning.jpg": encoded(photo(), "JPEG")[:30],
    "junk.png": bytes(range(256)) * 4,
    "text.jpg": b"<html>404 Not Found</html>\n",
}


@pytest.fixture
def dataset(tmp_path: Path) -> Images:
    """Class cat: a good image, then the broken ones, then a palette image; class dog: a good image."""
    root = write_images(tmp_path, {"train": {"cat": 1, "dog": 1}})
    for name, content in BROKEN.items():
        (root / "train/cat" / name).write_bytes(content)
    (root / "train/cat/palette.png").write_bytes(palette_image())
    dataset = data.create_split(config_of(root), train=True).dataset
    assert isinstance(dataset, Images)
    return dataset


def index_of(dataset: Images, name: str) -> int:
    [index] = [i for i in range(len(dataset)) if dataset.source.reader.filename(i, basename=True) == name]
    return index


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_of_a_folder_is_unreadable_and_found_by_its_path(name: str, dataset: Images) -> None:
    index = index_of(dataset, name)
    sample = dataset[index]
    assert sample.image is None
    assert (sample.place, sample.fault) == (index, UNREADABLE)
    assert len(sample.reason) > 5
    assert "\n" not in sample.reason
    path = Path(dataset.name(index))
    assert path.is_absolute()
    assert path.read_bytes() == BROKEN[name]


def test_good_files_of_a_folder_keep_their_class_and_name(dataset: Images) -> None:
    assert len(dataset) == len(BROKEN) + 3
    for index, (target, fault, ending) in {
        0: (0, "", "cat/0.png"),
        index_of(dataset, "palette.png"): (0, "palette", "cat/palette.png"),
        len(dataset) - 1: (1, "", "dog/0.png"),
    }.items():
        sample = dataset[index]
        assert sample.image is not None
        assert sample.image.shape == (3, 32, 32)
        assert (sample.target, sample.place, FAULTS[sample.fault]) == (target, index, fault)
        assert dataset.name(index).endswith(ending)


def test_decompression_bomb_is_unreadable(dataset: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 // 2 - 1)
    assert dataset[0].fault == UNREADABLE
    assert "decompression bomb" in dataset[0].reason
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)
    assert dataset[0].fault == 0


class Source:
    """As torchvision's datasets: opens by itself, and may know its paths."""

    def __init__(self, paths: bool) -> None:
        if paths:
            self.samples = [("set/a.png", 0), ("set/b.png", 1)]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 1:
            raise OSError("image file is truncated\n(12 bytes not processed)")
        return Image.fromarray(DEEP), 7


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy())


@pytest.mark.parametrize(("paths", "names"), [(True, ["set/a.png", "set/b.png"]), (False, ["image 0", "image 1"])])
def test_any_dataset_of_pairs_will_do(paths: bool, names: list[str]) -> None:
    dataset = Images(Source(paths), pixels_of, seed=0)
    assert len(dataset) == 2
    good, broken = dataset[0], dataset[1]
    assert good.image is not None
    np.testing.assert_array_equal(good.image.numpy(), grey((DEEP // 256).astype(np.uint8)))
    assert (good.target, good.place, FAULTS[good.fault]) == (7, 0, "16-bit")
    assert broken[0] is None
    assert broken[2:] == (1, UNREADABLE, "image file is truncated (12 bytes not processed)")
    assert [dataset.name(0), dataset.name(1)] == names


def test_error_of_a_transform_is_not_taken_for_a_broken_image() -> None:
    def wrong(image: Image.Image) -> Tensor:
        raise TypeError("no such size")

    with pytest.raises(TypeError, match="no such size"):
        Images(Source(True), wrong, seed=0)[0]


def test_dataset_ends() -> None:
    dataset = Images([(photo(), 0)] * 2, pixels_of, seed=0)
    with pytest.raises(IndexError):
        dataset[2]


# ---- batches


def sample(number: int, fault: int = 0) -> Sample:
    return Sample(None if fault == UNREADABLE else torch.full((3, 2, 2), float(number)), number, 100 + number, fault)


def faulty(*faults: int) -> list[Sample]:
    return [sample(number, fault) for number, fault in enumerate(faults)]


@pytest.mark.parametrize("faults", [(1, 0, 1, 3), (0, 1, 0), (1, 1, 1, 0), (0, 2)], ids=str)
def test_another_image_of_the_batch_stands_in_with_its_class(faults: tuple[int, ...]) -> None:
    batch = collate(faulty(*faults))
    assert batch.places.tolist() == [100 + i for i in range(len(faults))]
    assert batch.faults.tolist() == list(faults)
    shown = batch.images[:, 0, 0, 0].tolist()
    assert batch.images.shape == (len(faults), 3, 2, 2)
    assert shown == batch.targets.tolist()
    for number, fault in enumerate(faults):
        assert faults[int(shown[number])] != UNREADABLE
        assert fault == UNREADABLE or shown[number] == number


def test_stand_ins_of_a_batch_are_not_all_the_same() -> None:
    assert len(set(collate(faulty(1, 1, 1, 0, 0, 0)).targets[:3].tolist())) == 3


def test_batch_without_a_readable_image_is_refused_by_its_place() -> None:
    with pytest.raises(DataError, match=r"batch of 3 can be read, the first is 100"):
        collate(faulty(1, 1, 1))


def test_evaluation_leaves_unreadable_images_out() -> None:
    batch = collate_readable(faulty(1, 0, 1, 3))
    assert batch.images[:, 0, 0, 0].tolist() == batch.targets.tolist() == [1, 3]
    assert batch.places.tolist() == [100, 101, 102, 103]
    assert batch.faults.tolist() == [1, 0, 1, 3]


def test_evaluation_batch_may_be_left_without_images() -> None:
    batch = collate_readable(faulty(1, 1))
    assert len(batch.images) == len(batch.targets) == 0
    assert batch.places.tolist() == [100, 101]
    assert batch.faults.tolist() == [1, 1]


# ---- what is told


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_odd_images_are_told_once_by_path_and_broken_ones_with_the_reason(
    dataset: Images, caplog: pytest.LogCaptureFixture
) -> None:
    order = [0, index_of(dataset, "text.jpg"), index_of(dataset, "palette.png")]
    batch = collate([dataset[i] for i in order])
    dataset.tell(batch)
    broken, palette = told(caplog)
    root = Path(dataset.source.reader.filename(0, absolute=True)).parent
    assert broken.startswith(f"unreadable image: {root / 'text.jpg'} (")
    assert "cannot identify" in broken
    assert palette == f"palette image: {root / 'palette.png'}"
    dataset.tell(batch)
    dataset.tell(collate([dataset[i] for i in order[::-1]]))
    assert len(told(caplog)) == 2
    dataset.tell(collate([dataset[0], dataset[index_of(dataset, "empty.jpg")]]))
    assert len(told(caplog)) == 3


def test_nothing_is_told_of_a_batch_in_order(dataset: Images, caplog: pytest.LogCaptureFixture) -> None:
    dataset.tell(collate([dataset[0], dataset[len(dataset) - 1]]))
    assert told(caplog) == []


def test_telling_of_a_readable_image_does_not_decode_it_again(
    dataset: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate([dataset[index_of(dataset, "palette.png")]])
    opened: list[Any] = []
    monkeypatch.setattr(Image, "open", opened.append)
    dataset.tell(batch)
    assert opened == []


def test_telling_leaves_no_file_open_that_workers_would_share(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"train": {"cat": 2, "dog": 1}})
    with tarfile.open(root / "train.tar", "w") as tar:
        tar.add(root / "train", arcname=".")
    dataset = data.create_split(config_of(root, **{"data.train_split": "train.tar"}), train=True).dataset
    place = torch.zeros(1, dtype=torch.int64)
    dataset.tell(Batch(torch.zeros(1, 3, 2, 2), place, place, place + FAULTS.index("palette"), [""]))
    assert dataset.source.reader.tar_state.tf is None  # type: ignore[union-attr]
