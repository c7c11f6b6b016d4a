"""Images as sequences: values and their order, each source's files, and what is refused."""

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from PIL import Image
from torchvision.datasets import CIFAR10

from sgconvnext.training.data import Digits
from sgconvnext.training.sequences.pixels import Pixels, open_pixels


def idx(array: Any) -> bytes:
    """A file in Fashion-MNIST's format."""
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


GREYS = np.arange(2 * 28 * 28).reshape(2, 28, 28) % 251


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Two images for training and one for the test, as torchvision lays them out."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, number in (("train", 2), ("t10k", 1)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(GREYS[:number]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx([9, 4][:number]))
    return raw


def test_pixels_are_the_rows_one_after_another() -> None:
    picture = Image.fromarray(np.array([[0, 7, 255], [3, 128, 9]], "uint8"))
    tokens, target = Pixels([(picture, 5)])[0]
    assert tokens.dtype == torch.int64
    assert (tokens.tolist(), target) == ([0, 7, 255, 3, 128, 9], 5)


def test_floats_are_the_tokens_from_0_to_1_in_one_channel() -> None:
    picture = Image.fromarray(np.array([[0, 255], [51, 102]], "uint8"))
    signal, _ = Pixels([(picture, 0)], tokens=False)[0]
    assert signal.dtype == torch.float32
    torch.testing.assert_close(signal, torch.tensor([[0, 1, 0.2, 0.4]]))


def test_colours_have_the_grey_of_their_luminance() -> None:
    picture = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], "uint8"))
    assert Pixels([(picture, 0)])[0][0].tolist() == [76, 150, 29]  # 0.299, 0.587 and 0.114 of 255


def test_digits_are_those_of_the_images() -> None:
    digits, source = open_pixels("digits", "", train=False), Digits(train=False)
    assert len(digits) == 360
    tokens, target = digits[7]
    assert tokens.reshape(8, 8).tolist() == np.array(source.images[7]).tolist()
    assert target == source.targets[7]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_fashion_mnist_is_read_where_torchvision_and_debian_keep_it(fashion: Path, zipped: bool, flat: bool) -> None:
    if zipped:
        for path in list(fashion.iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    train, test = (
        open_pixels("fashion-mnist", str(fashion if flat else fashion.parents[1]), t) for t in (True, False)
    )
    assert (len(train), len(test)) == (2, 1)
    tokens, target = train[1]
    assert (tokens.tolist(), target) == (GREYS[1].flatten().tolist(), 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is no idx file"]),
        (idx(GREYS)[:9], ["is no idx file"]),
        (idx([1, 2]), ["is no idx file of bytes with 3 dimensions"]),
        (idx(GREYS)[:-1], ["holds 1567 values", "says 1568"]),
        (idx(GREYS) + b"\0", ["holds 1569 values"]),
        (idx(GREYS[:1]), ["holds 1 images", "2 classes"]),
    ],
)
def test_damaged_idx_file_is_refused(fashion: Path, content: bytes, words: list[str]) -> None:
    (fashion / "train-images-idx3-ubyte").write_bytes(content)
    with refused("train-images-idx3-ubyte", *words):
        open_pixels("fashion-mnist", str(fashion), train=True)


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(idx(GREYS))[:-20]])
def test_damaged_gz_file_is_refused(fashion: Path, content: bytes) -> None:
    (fashion / "t10k-images-idx3-ubyte").unlink()
    (fashion / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with refused("t10k-images-idx3-ubyte.gz"):
        open_pixels("fashion-mnist", str(fashion), train=False)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with refused(str(tmp_path), "train-images-idx3-ubyte", "FashionMNIST/raw"):
        open_pixels("fashion-mnist", str(tmp_path), train=True)
    with refused(str(tmp_path), "cifar-10-batches-py"):
        open_pixels("cifar10", str(tmp_path), train=True)
    with refused("'mnist'", "digits, fashion-mnist, cifar10"):
        open_pixels("mnist", str(tmp_path), train=True)


def test_cifar10_is_grey_and_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    red = np.zeros((1, 3, 32, 32), np.uint8)
    red[0, 0, 0, 1] = 255  # the second pixel of the first row
    (folder / "test_batch").write_bytes(pickle.dumps({"data": red.reshape(1, -1), "labels": [3]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    tokens, target = open_pixels("cifar10", str(tmp_path), train=False)[0]
    assert (tokens.shape, target) == ((1024,), 3)
    assert tokens.nonzero().flatten().tolist() == [1]
    assert tokens[1] == 76
