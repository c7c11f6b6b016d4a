"""Image files as they come: odd ones decoded, unreadable ones counted and replaced, each told by its place."""

import hashlib
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.Image import Transpose
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..errors import DataError, one_line
from . import rng

_logger = logging.getLogger(__name__)

UNREADABLE = 1
# what the numbers in Sample.fault and Batch.faults mean; all but unreadable images are decoded
FAULTS = (
    *("", "unreadable", "CMYK", "palette", "16-bit", "EXIF-rotated", "very large", "32-bit float"),
    "possibly turned (its EXIF cannot be decoded)",
)
NEARLY_BLACK = 16  # of 255: so dark are 12 bits in a file of 16, and floats of 0 to 1 with one value above 1
MAX_ASPECT = 200  # to resize the short side of a longer strip to a crop would take gigabytes
ORIENTATION = 0x0112  # EXIF's tag; its value 1 is upright, 2 to 8 are turned or mirrored
TURNS = {  # by the tag's value: what turns the image upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # two tags of TIFF, and a value of the second
# Modes that Pillow itself converts to RGB rightly; and others, with the mode to which they are converted first
PLAIN = ("1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
ALPHA = {"LA": "RGBA", "RGBA": "RGBA", "P": "RGBA", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}


class Sample(NamedTuple):
    """One image, or sequence; None where it could not be read."""

    image: Tensor | None
    target: Any  # its class; of a language model, the tokens (L,)
    place: int  # the index in the dataset; in shards, the place in the epoch's order
    fault: int  # of FAULTS
    reason: str = ""  # why it could not be read


class Batch(NamedTuple):
    """A batch, and places, faults and reasons of all N samples, read or not.

    Images (B, 3, H, W) or sequences (B, ...); their classes (B,), or of a language model tokens (B, L).
    """

    images: Tensor
    targets: Tensor
    places: Tensor
    faults: Tensor
    reasons: list[str]


class TellsFaults:
    """Logs every odd image once, by its place."""

    noun = "image"  # what one sample is called

    def __init__(self) -> None:
        self.told: set[str] = set()

    def name(self, place: int) -> str:
        """What a person finds the image by: its path, or its number."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 of the names and classes, as far as they are known without opening an image."""
        raise NotImplementedError

    def tell(self, batch: Batch) -> None:
        """Log the odd images of a batch that were not told before."""
        for place, fault, reason in zip(batch.places.tolist(), batch.faults.tolist(), batch.reasons, strict=True):
            name = self.name(place) if fault else ""
            if fault and name not in self.told:
                self.told.add(name)
                _logger.warning("%s %s: %s%s", FAULTS[fault], self.noun, name, f" ({reason})" if reason else "")


class Images(TellsFaults, Dataset[Sample]):
    """Any dataset of images, with a stream of random numbers for every (seed, epoch, index), and faults told.

    Args:
        source: ``source[index]`` gives (PIL image, class), or it has timm's ``reader``, which gives (file, class).
        transform: of an RGB image.
        seed: of the random numbers; with the epoch, which the loader sets, and the index it fixes a sample.
        upright: turn images as their EXIF orientation says.
    """

    def __init__(self, source: Any, transform: Callable[[Any], Tensor], seed: int, upright: bool = False) -> None:
        super().__init__()
        self.source, self.transform, self.seed, self.upright = source, transform, seed, upright
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        target = -1
        with rng.stream(self.seed, self.epoch, index):
            try:
                found, target = self._open(index)
                image, fault = decode(found, self.upright)
            except Exception as error:  # Pillow raises a dozen types for damaged files
                return unreadable(target, index, error)
            return Sample(self.transform(image), int(target), index, fault)

    def _open(self, index: int) -> tuple[Image.Image, int]:
        if not hasattr(self.source, "reader"):
            image, target = self.source[index]
            return image, target
        file, target, *_ = self.source.reader[index]
        return Image.open(file), target

    def name(self, place: int) -> str:
        """The path of an image, where the dataset knows one, else its number."""
        if hasattr(self.source, "reader"):
            return str(self.source.reader.filename(place, absolute=True))
        return str(self.source.samples[place][0]) if hasattr(self.source, "samples") else f"image {place}"

    def targets(self) -> list[int] | None:
        """Every image's class, where the dataset has a list of them."""
        reader: Any = getattr(self.source, "reader", None)
        found = getattr(self.source, "targets", None)
        if found is None:
            found = getattr(reader, "targets", None)  # of a tar file
        if found is None and hasattr(reader, "samples"):
            found = [sample[1] for sample in reader.samples]
        return None if found is None else [int(target) for target in found]

    def digest(self) -> str:
        owner = getattr(self.source, "reader", self.source)
        root, files = str(getattr(owner, "root", "")), getattr(owner, "samples", ())
        # (path, class) in folders, (tarfile's record, ...) in tar files; the root may move
        names = [str(getattr(file[0], "name", file[0])).removeprefix(root) for file in files]
        return hashlib.sha256(repr((len(self), names, self.targets())).encode()).hexdigest()


def unreadable(target: int, place: int, error: Exception) -> Sample:
    """What stands for an image that could not be read, with the reason in one line."""
    return Sample(None, target, place, UNREADABLE, one_line(error))


def decode(image: Image.Image, upright: bool = False) -> tuple[Image.Image, int]:
    """An opened image as 8-bit RGB, and what was unusual about it, as an index into FAULTS.

    As in timm and torchvision, alpha is dropped and EXIF's orientation ignored, but for ``upright``. Other than there,
    deep greys are scaled to 8 bits: Pillow's own conversion makes values above 255 white, and floats of 0 to 1 black.

    Raises:
        ValueError: its shape, mode or range of values has no known meaning.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"it is {image.width} x {image.height} pixels")
    fault = "very large" if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 2**62) else ""
    image.load()  # before EXIF is read: Pillow turns TIFF files itself, and finds EXIF of PNG files behind the pixels
    turn = _orientation(image)
    if turn in TURNS:
        fault = "EXIF-rotated"
    elif turn is None and upright:
        fault = FAULTS[-1]
    if image.mode in PLAIN:
        fault = "CMYK" if image.mode == "CMYK" else fault
        shown = image.convert("RGB")
    elif image.mode in ALPHA:
        fault = "palette" if image.mode in ("P", "PA") else fault
        shown = _opaque(image.convert(ALPHA[image.mode]))
    elif image.mode in ("F", "I") or image.mode.startswith("I;16"):
        fault = "32-bit float" if image.mode == "F" else "16-bit"
        shown = _greys(image).convert("RGB")
    else:
        raise ValueError(f"its pixels are of the mode {image.mode}, which is unknown here")
    if upright and turn in TURNS:
        shown = shown.transpose(TURNS[turn])
    return shown, FAULTS.index(fault)


def _orientation(image: Image.Image) -> int | None:
    """EXIF's orientation of an image: 1 (upright) where it has none, None where EXIF cannot be decoded."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises half a dozen types; the pixels are not affected
        return None


def _opaque(image: Image.Image) -> Image.Image:
    """The image without alpha; refused if only alpha shows anything, as in many a drawing of black on nothing."""
    *colours, (clear, solid) = np.reshape(image.getextrema(), (-1, 2))
    if clear < solid and all(low == high for low, high in colours):
        raise ValueError("all of its pixels have one colour, only their transparency differs; put it on a background")
    return image.convert("RGB")


def _greys(image: Image.Image) -> Image.Image:
    """Deep greys in 8 bits. White is 65535 for integers, as in PNG; for floats 1, or 255 if a value is above 1.

    Other ranges would have to be guessed.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})  # of TIFF files
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # False for NaN too
            raise ValueError(f"its greys run from {low:g} to {high:g}; floats are known from 0 to 1 or from 0 to 255")
        greys = np.rint(values * np.float32(255 if high <= 1 else 1)).astype(np.uint8)
    else:
        if low < 0 or high > 65535:
            raise ValueError(f"its greys run from {low} to {high}; integers are known from 0 to 65535")
        bits = 12 if tags.get(BITS_PER_SAMPLE) == (12,) else 16
        greys = (values.astype(np.int32) >> (bits - 8)).astype(np.uint8)
    if high > 0 and greys.max() < NEARLY_BLACK:
        raise ValueError(f"its greys reach no further than {high:g} and would be nearly black; store them in 8 bits")
    return Image.fromarray(255 - greys if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else greys)


def collate(samples: list[Sample], name: Callable[[int], str] = str) -> Batch:
    """A training batch; for an image that could not be read another of the batch, with its class, stands in.

    Raises:
        DataError: there is no other.
    """
    good = [sample for sample in samples if sample.image is not None]
    if not good:
        first = samples[0]
        raise DataError(
            f"no image of a batch of {len(samples)} can be read, the first is {name(first.place)} ({first.reason}); "
            "repair them, or raise optim.batch_per_device so that another can stand in"
        )
    shown = [sample if sample.image is not None else good[i % len(good)] for i, sample in enumerate(samples)]
    return _batch(shown, samples)


def collate_readable(samples: list[Sample]) -> Batch:
    """An evaluation batch: images that could not be read are left out, for no other image may count twice."""
    good = [sample for sample in samples if sample.image is not None]
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), *_places(samples))
    return _batch(good, samples)


def _batch(shown: list[Sample], samples: list[Sample]) -> Batch:
    images = default_collate([sample.image for sample in shown])
    return Batch(images, default_collate([sample.target for sample in shown]), *_places(samples))


def _places(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    return (
        torch.tensor([sample.place for sample in samples]),
        torch.tensor([sample.fault for sample in samples]),
        [sample.reason for sample in samples],
    )


# Pillow refuses images of more than twice MAX_IMAGE_PIXELS as decompression bombs, and warns of those of more than
# MAX_IMAGE_PIXELS. The latter are decoded, counted and told here; the warning would repeat it in every worker.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
