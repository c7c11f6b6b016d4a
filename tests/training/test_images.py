"""Image files as they come: what is decoded to which pixels, what is left out, and what is told of either."""

import importlib.util
import io
import logging
import struct
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from training_helpers import micro_config, write_images

from sgconvnext.errors import DataError
from sgconvnext.training import data, images
from sgconvnext.training.images import FAULTS, UNREADABLE, Batch, Images, Sample, collate, collate_readable, decode

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


UNKNOWN = {
    "negative": np.array([[-1, 300]], dtype=np.int32),
    "32 bits": np.array([[0, 65536]], dtype=np.int32),
    "8 bits in 16": np.array([[0, 255]], dtype=np.uint16),
    "8 bits in 32": np.array([[0, 255]], dtype=np.int32),
    "negative float": np.array([[-0.5, 0.5]], dtype=np.float32),
    "16-bit float": np.array([[0, 256]], dtype=np.float32),
    "not a number": np.array([[0, np.nan, 1]], dtype=np.float32),
    "infinite": np.array([[0, np.inf]], dtype=np.float32),
    "tiny float": np.array([[0, 1e-3]], dtype=np.float32),
    "float a hair above 1": np.array([[0, 0.5, 1.0001]], dtype=np.float32),
    "12 bits in 16": np.array([[0, 4095]], dtype=np.uint16),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_greys_of_an_unknown_range_are_unreadable_and_not_black_or_white(kind: str) -> None:
    sample = Images([(Image.fromarray(UNKNOWN[kind]), 3)], pixels_of, seed=0)[0]
    assert (sample.image, sample.target, sample.fault) == (None, 3, UNREADABLE)
    assert "its greys r" in sample.reason
    assert "known from" in sample.reason or "would be nearly black" in sample.reason


def test_black_greys_are_black() -> None:
    for dtype in (np.uint16, np.int32, np.float32):
        assert not np.asarray(decode(Image.fromarray(np.zeros((2, 3), dtype=dtype)))[0]).any()


@pytest.mark.parametrize("white", [1, 255])
def test_float_greys_go_from_0_to_1_or_to_255(white: int) -> None:
    stored = (GREYS / np.float32(255 / white)).astype(np.float32)
    pixels, fault = decoded(encoded(Image.fromarray(stored), "TIFF"))
    assert fault == "32-bit float"
    np.testing.assert_array_equal(pixels, grey(GREYS))


def tiff(rows: bytes, width: int, bits: int, photometric: int, kind: int = 1) -> bytes:
    """A TIFF file of greys; photometric 0: white is zero; kind 3: floats."""
    height = len(rows) * 8 // (width * bits)
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    entries += [(278, height), (279, len(rows)), (339, kind)]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(entries)) + table + bytes(4)


def test_tiff_whose_white_is_zero_is_not_shown_as_a_negative() -> None:
    deep, floats = DEEP.astype("<u2"), (DEEP / 65535).astype("<f4")
    for rows, bits, kind in [(deep.tobytes(), 16, 1), (floats.tobytes(), 32, 3)]:
        usual, inverse = (decoded(tiff(rows, 4, bits, photometric, kind))[0] for photometric in (1, 0))
        np.testing.assert_array_equal(usual, 255 - inverse)
        assert usual[0, 0, 0] == 0


def test_white_of_twelve_bits_is_white() -> None:
    rows = bytes([0x00, 0x00, 0x10, 0x80, 0x0F, 0xFF])  # 0, 16, 2048, 4095
    np.testing.assert_array_equal(decoded(tiff(rows, 4, 12, 1))[0], grey(np.array([[0, 1, 128, 255]], np.uint8)))


def deep_png(values: NDArray[np.uint16], kind: int) -> bytes:
    """A PNG file of 16 bits a channel, (H, W, C), of the colour type: 2 is RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "channels", "shown"), [(2, 3, [0, 1, 2]), (4, 2, [0, 0, 0]), (6, 4, [0, 1, 2])])
def test_sixteen_bits_of_several_channels_keep_their_upper_half(kind: int, channels: int, shown: list[int]) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 4, channels), dtype=np.uint16)
    pixels, fault = decoded(deep_png(values, kind))
    assert fault == ""
    np.testing.assert_array_equal(pixels, (values // 256).astype(np.uint8)[..., shown])


# each with the largest error that its rounding makes of random colours, or greys
MODES = {"1": 0, "L": 0, "LA": 0, "La": 0, "RGB": 0, "RGBA": 0, "RGBa": 0, "RGBX": 0, "P": 0, "PA": 0, "CMYK": 0}
MODES |= {"YCbCr": 3, "HSV": 6, "LAB": 24, "I": 0, "I;16": 0, "I;16L": 0, "I;16B": 0, "I;16N": 0, "F": 0}


def in_mode(mode: str) -> tuple[Image.Image, NDArray[np.uint8]]:
    """The same picture in any mode, and its pixels in RGB."""
    if mode.startswith("I") or mode in ("1", "L", "LA", "La", "F"):
        values = np.where(GREYS > 100, 255, 0).astype(np.uint8) if mode == "1" else GREYS
        if mode in ("I;16", "I;16L", "I;16B", "I;16N"):
            deep = (GREYS.astype(np.uint16) * 256).astype({"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2"))
            return Image.frombytes(mode, GREYS.shape[::-1], deep.tobytes()), grey(GREYS)
        if mode == "I":
            return Image.fromarray(GREYS.astype(np.int32) * 256), grey(GREYS)
        return (Image.fromarray(values).convert("LA") if mode == "La" else Image.fromarray(values)).convert(
            mode
        ), grey(values)
    image = Image.fromarray(COLOURS[INDICES])
    if mode in ("P", "PA"):
        return Image.open(io.BytesIO(palette_image())).convert(mode), COLOURS[INDICES]
    return (image.convert("RGBA") if mode == "RGBa" else image).convert(mode), COLOURS[INDICES]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_shows_the_same_picture(mode: str) -> None:
    image, want = in_mode(mode)
    assert image.mode == mode
    sample = Images([(image, 0)], pixels_of, seed=0)[0]
    assert sample.image is not None, sample.reason
    assert np.abs(sample.image.numpy().astype(int) - want).max() <= MODES[mode]


def test_premultiplied_colours_are_divided_by_their_alpha() -> None:
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 51))
    image.putpixel((1, 0), (0, 255, 0, 255))
    pixels = np.asarray(decode(image.convert("RGBa"))[0])
    assert np.abs(pixels.astype(int) - np.array([[[200, 100, 50], [0, 255, 0]]])).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "PA"])
def test_drawing_in_alpha_alone_is_unreadable_and_not_black(mode: str) -> None:
    drawing = Image.merge("RGBA", [Image.new("L", (8, 4))] * 3 + [Image.fromarray(GREYS)])
    if mode == "PA":
        drawing = Image.merge("PA", [Image.new("L", (8, 4)), Image.fromarray(GREYS)])
    elif mode == "LA":
        drawing = Image.merge("LA", [Image.new("L", (8, 4)), Image.fromarray(GREYS)])
    elif mode == "RGBa":
        drawing = drawing.convert("RGBa")
    with refused("only their transparency differs", "put it on a background"):
        decode(drawing)


def test_mode_that_is_not_known_is_unreadable_with_its_name() -> None:
    image = Image.new("RGB", (2, 2))
    image._mode = "CMYK;7"  # type: ignore[attr-defined]
    with refused("CMYK;7", "unknown"):
        decode(image)


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


UNDECODABLE = {
    "junk": b"Exif\0\0what is this",
    "cut off": b"MM\0*\0\0\0\x08\0\x05\1\x12",
    "endless": b"II*\0\xff\xff\xff\xff",
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", UNDECODABLE)
def test_exif_that_cannot_be_decoded_costs_no_image(kind: str, exif: str) -> None:
    content = encoded(Image.new("RGB", (16, 8), (200, 100, 50)), kind, exif=UNDECODABLE[exif])
    for upright in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of some of them
            sample = Images([(Image.open(io.BytesIO(content)), 0)], pixels_of, seed=0, upright=upright)[0]
        assert sample.image is not None, sample.reason
        assert np.abs(sample.image.numpy().astype(int) - [200, 100, 50]).max() <= 6


def test_exif_that_cannot_be_decoded_is_told_where_images_are_to_be_turned_by_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = encoded(photo(), "PNG", exif=UNDECODABLE["junk"])
    for upright in (False, True):
        dataset = Images([(Image.open(io.BytesIO(content)), 0)], pixels_of, seed=0, upright=upright)
        dataset.tell(collate([dataset[0]]))
        assert told(caplog) == ["possibly turned (its EXIF cannot be decoded) image: image 0"] * upright


@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
def test_tiff_that_pillow_turns_by_itself_is_not_turned_twice(compression: str | None) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    content = encoded(Image.fromarray(COLOURS[INDICES]), "TIFF", exif=exif, compression=compression)
    np.testing.assert_array_equal(decoded(content, upright=True)[0], np.rot90(COLOURS[INDICES], -1))


def test_very_large_image_is_decoded_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(photo(12), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    spec = importlib.util.find_spec("sgconvnext.training.images")
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


@pytest.mark.parametrize("dataset", ["", "torch/folder"])
def test_deep_greys_of_a_folder_are_decoded_here_and_not_by_torchvision(dataset: str, tmp_path: Path) -> None:
    root = write_images(tmp_path, {"train": {"cat": 1}})
    (root / "train/cat/0.png").write_bytes(encoded(Image.fromarray(DEEP.repeat(16, 0).repeat(8, 1)), "PNG"))
    transform = {"data.crop_pct": 1.0, "data.img_size": 32, "data.interpolation": "bilinear"}
    config = config_of(root, **transform, **{"data.dataset": dataset, "data.val_split": "train"})
    image = data.create_split(config, train=False).dataset[0].image  # type: ignore[index]
    assert image is not None
    np.testing.assert_array_equal((image[0] * 255).round().numpy()[::16, ::8], DEEP // 256)


def test_torchvisions_loader_converts_nothing_before_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path, {"train": {"cat": 1}})
    (root / "train/cat/0.png").write_bytes(encoded(Image.fromarray(DEEP.astype(np.uint16)), "PNG"))
    monkeypatch.setattr(data, "create_dataset", lambda name, **options: ImageFolder(root / "train"))
    dataset = data.create_split(config_of(root, **{"data.dataset": "torch/imagenet"}), train=True).dataset
    assert isinstance(dataset, Images)
    dataset.transform = pixels_of
    image = dataset[0].image
    assert image is not None
    np.testing.assert_array_equal(image.numpy(), grey((DEEP // 256).astype(np.uint8)))


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
