"""Image files as they come: odd ones decoded, unreadable ones counted and replaced, each told by its place."""

import hashlib
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from . import rng
from .errors import DataError, one_line

_logger = logging.getLogger(__name__)

UNREADABLE = 1
# what Sample.fault and Batch.faults count; all but the unreadable ones are decoded
FAULTS = ("", "unreadable", "CMYK", "palette", "16-bit", "EXIF-rotated", "very large")
MAX_ASPECT = 200  # to resize the short side of a longer strip to a crop would take gigabytes
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright, 2 to 8 are turned or mirrored


class Sample(NamedTuple):
    """One image; None where it could not be read."""

    image: Tensor | None
    target: int
    place: int  # the index in the dataset; in shards, the place in the epoch's order
    fault: int  # of FAULTS
    reason: str = ""  # why it could not be read


class Batch(NamedTuple):
    """Images (B, 3, H, W) and their classes (B,); places, faults and reasons of all N samples, read or not."""

    images: Tensor
    targets: Tensor
    places: Tensor
    faults: Tensor
    reasons: list[str]


class TellsFaults:
    """Logs every odd image once, by its place."""

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
                _logger.warning("%s image: %s%s", FAULTS[fault], name, f" ({reason})" if reason else "")


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

    As timm and torchvision, alpha is dropped and EXIF's orientation ignored, but for ``upright``. Unlike them, 16-bit
    greys are divided by 256; Pillow's own conversion makes everything above 255 white.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"it is {image.width} x {image.height} pixels")
    fault = FAULTS.index("very large") if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 2**62) else 0
    if image.getexif().get(ORIENTATION) in range(2, 9):
        fault = FAULTS.index("EXIF-rotated")
        image = ImageOps.exif_transpose(image) if upright else image
    if image.mode == "CMYK":
        fault = FAULTS.index("CMYK")
    elif image.mode in ("P", "PA"):
        fault = FAULTS.index("palette")
        image = image.convert("RGBA")  # the way to RGB that knows of transparent colours
    elif image.mode == "I" or image.mode.startswith("I;16"):
        fault = FAULTS.index("16-bit")
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB"), fault


def collate(samples: list[Sample], name: Callable[[int], str] = str) -> Batch:
    """A training batch; for an image that could not be read another of the batch stands in, and its class with it.

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
    return Batch(images, torch.tensor([sample.target for sample in shown]), *_places(samples))


def _places(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    return (
        torch.tensor([sample.place for sample in samples]),
        torch.tensor([sample.fault for sample in samples]),
        [sample.reason for sample in samples],
    )


# Pillow refuses more than twice MAX_IMAGE_PIXELS as a decompression bomb, and only warns of more than once; those are
# decoded and counted here, so that the warning would say it again in every worker.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
