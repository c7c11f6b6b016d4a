"""Images as sequences of grey values, row by row, as in the Image task of the Long Range Arena (arXiv 2011.04006).

    open_pixels("digits", "", train=True)  # 8 x 8 = 64 values, from scikit-learn
    open_pixels("fashion-mnist", "/usr/share/datasets/fashion-mnist", train=True)  # 28 x 28 = 784 values
    open_pixels("cifar10", "/data/cifar10", train=True)  # 32 x 32 = 1024 values: the Image task itself

Fashion-MNIST comes with Debian: apt-get install dataset-fashion-mnist.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from ..digits import Digits
from .unzipped import read_unzipped


class Labelled(Protocol):
    """Images with a class each, all of one size."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class Pixels(Dataset[tuple[Tensor, int]]):
    """Grey values of images of any mode by Pillow's weights, 0.299 R + 0.587 G + 0.114 B, row by row from the top.

    An item is (tokens, class): int64 (H*W,) from 0 to 255.

    Args:
        source: gives (PIL image, class).
        tokens: False for (signal, class) in place of tokens: float32 (1, H*W) from 0 to 1.
    """

    vocabulary: ClassVar[int] = 256

    def __init__(self, source: Labelled, tokens: bool = True) -> None:
        if type(tokens) is not bool:
            raise ValueError(f"tokens={tokens!r} must be True or False")
        self.source, self.tokens = source, tokens
        self.class_to_idx = getattr(source, "class_to_idx", None)
        self.targets = getattr(source, "targets", None)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.source[index]
        greys = torch.from_numpy(np.array(image.convert("L"))).flatten()
        return (greys.long() if self.tokens else greys[None] / 255), target


class FashionMNIST(Dataset[tuple[Image.Image, int]]):
    """Zalando's pictures of ten kinds of clothes (arXiv 1708.07747): 28 x 28 greys, 60,000 and 10,000 of them.

    Args:
        root: folder of the four files, or of torchvision's FashionMNIST/raw/ with them; gzipped or not.
        train: the 60,000; else the 10,000.

    Raises:
        ValueError: a file is missing, damaged, or not as long as its header says.
    """

    def __init__(self, root: str, train: bool) -> None:
        part = "train" if train else "t10k"
        images, self.images = _read_idx(root, f"{part}-images-idx3-ubyte", 3)
        labels, targets = _read_idx(root, f"{part}-labels-idx1-ubyte", 1)
        if len(self.images) != len(targets):
            raise ValueError(f"{images} holds {len(self.images)} images, but {labels} {len(targets)} classes")
        self.targets: list[int] = targets.tolist()
        self.class_to_idx = {name: number for number, name in enumerate(datasets.FashionMNIST.classes)}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]


def _read_idx(root: str, name: str, dims: int) -> tuple[Path, np.ndarray[Any, np.dtype[np.uint8]]]:
    """An idx file and its array: two zeros, 8 for bytes, the number of sizes, the sizes (32 bits, big end first)."""
    folders = Path(root, "FashionMNIST", "raw"), Path(root)
    places = [folder / file for folder in folders for file in (name, name + ".gz")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"{root!r} holds no {name}, nor does its FashionMNIST/raw; name the folder that does")
    content = read_unzipped(path)
    begin = 4 + 4 * dims
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) < begin:
        raise ValueError(f"{path} is no idx file of bytes with {dims} dimensions")
    shape = np.frombuffer(content[4:begin], ">u4").tolist()
    if len(content) - begin != math.prod(shape):
        raise ValueError(f"{path} holds {len(content) - begin} values, but its header says {math.prod(shape)}")
    return path, np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _cifar10(root: str, train: bool) -> Labelled:
    """torchvision's, whose checksums tell a damaged file."""
    try:
        return datasets.CIFAR10(root, train)
    except RuntimeError as error:
        raise ValueError(f"{root!r} holds no whole cifar-10-batches-py, as torchvision unpacks it") from error


SOURCES: dict[str, Callable[[str, bool], Labelled]] = {  # all of ten classes
    "digits": lambda _, train: Digits(train),
    "fashion-mnist": FashionMNIST,
    "cifar10": _cifar10,
}


def open_pixels(name: str, root: str, train: bool, tokens: bool = True) -> Pixels:
    """A data set of ten classes by its name in SOURCES; ``root`` is its folder, but digits need none.

    Raises:
        ValueError: there is none of that name, or its files or scikit-learn are missing or damaged.
    """
    if name not in SOURCES:
        raise ValueError(f"there are no images called {name!r}; use {', '.join(SOURCES)}")
    return Pixels(SOURCES[name](root, train), tokens)
