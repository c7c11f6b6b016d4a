"""Class folders and tar files: which files are read, as which class, in which order; what is said of the others."""

import io
import os
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import refused
from PIL import Image, features
from timm.data import create_dataset
from torchvision.datasets import ImageFolder
from training_helpers import alone, micro_config, write_images

from sgconvnext.training import data, image_folders
from sgconvnext.training.data import Split

ALIKE = ["A", "a", "B", "b", "01", "1", "001", "10", "2", "x1", "X01", "Ä", "ä", "²"]  # EMNIST's, chars74k's
USUAL = ["n01440764", "n02085620", "9", "10", "cat", "Dog", "zebra 2", "zebra 10", "a-b", "a_b", "été"]


def config_of(root: Path, **changes: Any) -> Any:
    return micro_config(**({"data.dataset": "", "data.root": str(root), "model.num_classes": None} | changes))


def split_of(root: Path, **changes: Any) -> Split:
    return data.create_split(config_of(root, **changes), train=True)


def picture(shade: int = 0, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), shade, "uint8")).save(file, kind)
    return file.getvalue()


def write(root: Path, *paths: str) -> Path:
    """Files below root; images have 32 x 32 pixels, everything else is empty; a path that ends in / is a folder."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (root / path).mkdir()
            continue
        (root / path).write_bytes(picture() if path.endswith((".png", ".PNG")) else b"")
    return root


def pack(tar: Path, *paths: str) -> None:
    """A tar file of the same, in this order."""
    with tarfile.open(tar, "w") as file:
        for path in paths:
            member = tarfile.TarInfo(path.rstrip("/"))
            content = picture() if path.endswith(".png") else b""
            member.type = tarfile.DIRTYPE if path.endswith("/") else tarfile.REGTYPE
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def in_either(kind: str, root: Path, *paths: str) -> Split:
    """The paths below the training split, as a folder or as a tar file."""
    if kind == "folder":
        write(root / "train", *paths)
        return split_of(root)
    pack(root / "train.tar", *paths)
    return split_of(root, **{"data.train_split": "train.tar"})


def labels(split: Split) -> dict[str, str]:
    """The class of every image by its path below the split."""
    assert isinstance(split.dataset, data.Images)
    assert split.class_to_idx is not None
    names = {number: name for name, number in split.class_to_idx.items()}
    targets = split.dataset.targets()
    assert targets is not None
    paths = split.dataset.source.reader.filenames()
    return {path: names[target] for path, target in zip(paths, targets, strict=True)}


BOTH = pytest.mark.parametrize("kind", ["folder", "tar"])

# ---- the order of classes and files


def test_classes_that_differ_in_case_or_zeros_are_numbered_by_their_characters(tmp_path: Path) -> None:
    """Not by Python's hashes, which differ between the processes of a run."""
    names = [name for name in ALIKE if name != "²"]
    write(tmp_path / "train", *(f"{name}/1.png" for name in names))
    pack(tmp_path / "train.tar", *(f"{name}/1.png" for name in names))
    want = ["001", "01", "1", "2", "10", "A", "a", "B", "b", "X01", "x1", "Ä", "ä"]
    for split in ("train", "train.tar"):
        numbers = split_of(tmp_path, **{"data.train_split": split}).class_to_idx
        assert list(numbers.items()) == [(name, number) for number, name in enumerate(want)]


def test_class_whose_name_is_a_digit_of_no_number_is_no_error(tmp_path: Path) -> None:
    assert split_of(write(tmp_path, "train/²/1.png", "train/a/1.png")).class_to_idx == {"a": 0, "²": 1}


def test_files_that_differ_in_case_or_zeros_have_one_order_whatever_the_file_system(tmp_path: Path) -> None:
    paths = [f"{folder}/{name}.png" for folder in ("A", "a") for name in ("1", "01", "001", "x", "X")]
    lists = []
    for place in ("one", "two"):
        random.Random(place).shuffle(paths)
        split = split_of(write(tmp_path / place, *(f"train/{path}" for path in paths)))
        lists.append(list(labels(split)))
    numbers, letters = ("001", "01", "1"), ("X", "x")
    want = [f"{folder}/{name}.png" for names in (numbers, letters) for folder in ("A", "a") for name in names]
    assert lists[0] == lists[1] == want


def test_order_is_timms_where_timm_has_one(tmp_path: Path) -> None:
    write(
        tmp_path / "train", *(f"{name}/{file}.png" for name in USUAL for file in ("10", "9", "b", "img 2", "img 10"))
    )
    pack(tmp_path / "train.tar", *(f"./{name}/{file}.png" for name in USUAL for file in ("10", "9", "a 7", "b")))
    for name in ("train", "train.tar"):
        timms = create_dataset("", root=str(tmp_path / name), search_split=False).reader
        ours = split_of(tmp_path, **{"data.train_split": name})
        assert ours.class_to_idx == getattr(timms, "class_to_idx", None) or timms.class_name_to_idx
        reader = ours.dataset.source.reader  # type: ignore[union-attr]
        assert reader.filenames(absolute=True) == timms.filenames(absolute=True)
        assert ours.dataset.targets() == [int(i) for i in getattr(timms, "targets", [s[1] for s in timms.samples])]  # type: ignore[union-attr]


def test_order_is_torchvisions_where_torchvision_is_asked_for(tmp_path: Path) -> None:
    write(
        tmp_path / "train", *(f"{name}/{file}.png" for name in USUAL + ALIKE for file in ("10", "9", "X", "x", "d/1"))
    )
    theirs = ImageFolder(tmp_path / "train")
    ours = split_of(tmp_path, **{"data.dataset": "torch/folder"})
    assert ours.class_to_idx == theirs.class_to_idx
    reader = ours.dataset.source.reader  # type: ignore[union-attr]
    assert reader.samples == theirs.samples


FOLDER, TAR = "5f5d5939ca04", "cfe2d383d205"  # as commit 7a070d1 found them


def test_list_of_an_ordinary_folder_has_the_digest_that_earlier_checkpoints_hold(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"train": {"n01": 3, "n02": 2}})
    with tarfile.open(root / "train.tar", "w") as tar:
        tar.add(root / "train", arcname=".")
    assert split_of(root).dataset.digest()[:12] == FOLDER
    assert split_of(root, **{"data.dataset": "torch/folder"}).dataset.digest()[:12] == FOLDER
    assert split_of(root, **{"data.train_split": "train.tar"}).dataset.digest()[:12] == TAR


# ---- which class


@BOTH
def test_class_is_the_folder_below_the_split_whatever_lies_deeper(kind: str, tmp_path: Path) -> None:
    split = in_either(
        kind, tmp_path, "cat/day/1.png", "cat/night/1.png", "cat/2.png", "dog/day/a/b/1.png", "dog/2.png"
    )
    assert split.class_to_idx == {"cat": 0, "dog": 1}
    assert len(split) == 5
    assert labels(split) == {path: path.partition("/")[0] for path in labels(split)}


@BOTH
def test_folders_of_one_name_in_two_classes_are_no_class(kind: str, tmp_path: Path) -> None:
    split = in_either(kind, tmp_path, "cat/train/1.png", "dog/train/1.png", "fox/train/1.png")
    assert split.class_to_idx == {"cat": 0, "dog": 1, "fox": 2}


@pytest.mark.parametrize("above", ["./", "train/", "./data/imagenet/train/", "/data/train/"])
def test_folders_above_all_classes_of_a_tar_file_are_passed_over(above: str, tmp_path: Path) -> None:
    beside = ["README.txt", f"{above}LICENSE", f"{above}.cache/x", ".git/objects/of/it/all/x"]
    pack(tmp_path / "train.tar", *beside, *(above + path for path in ("cat/a/1.png", "cat/b/1.png", "dog/1.png")))
    split = split_of(tmp_path, **{"data.train_split": "train.tar"})
    assert split.class_to_idx == {"cat": 0, "dog": 1}
    assert split.unread == {".txt": 1, "no suffix": 3}


def test_tar_file_of_a_single_class_keeps_it(tmp_path: Path) -> None:
    assert in_either("tar", tmp_path, "cat/1.png", "cat/day/2.png").class_to_idx == {"cat": 0}


def test_tar_files_within_a_tar_file_are_class_folders(tmp_path: Path) -> None:
    pack(tmp_path / "cat.tar", "1.png", "day/2.png", "notes.txt", "deeper.tar")
    (tmp_path / "dog.tar").write_bytes((tmp_path / "cat.tar").read_bytes())
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("cat", "dog"):
            tar.add(tmp_path / f"{name}.tar", arcname=f"./train/{name}.tar")
    split = split_of(tmp_path, **{"data.train_split": "train.tar"})
    assert split.class_to_idx == {"cat": 0, "dog": 1}
    assert Counter(split.dataset.targets()) == {0: 2, 1: 2}  # type: ignore[union-attr,arg-type]
    assert split.unread == {".txt": 2, ".tar": 2}
    for i in range(4):
        assert split.dataset[i].image.shape == (3, 32, 32)  # type: ignore[index]


def test_damaged_tar_file_within_a_tar_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        member = tarfile.TarInfo("train/cat.tar")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"junk"))
    with refused("train/cat.tar in it is no whole tar file"):
        split_of(tmp_path, **{"data.train_split": "train.tar"})


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_notes_of_macos_are_no_pictures(kind: str, tmp_path: Path) -> None:
    split = in_either(kind, tmp_path, "cat/1.png", "cat/._1.png", "dog/1.png")
    assert labels(split) == {"cat/1.png": "cat", "dog/1.png": "dog"}
    assert split.unread == {"._*": 1}


def test_one_folder_around_the_classes_is_refused_and_not_taken_for_the_only_class(tmp_path: Path) -> None:
    write(tmp_path, "train/images/cat/1.png", "train/images/dog/1.png")
    with refused("its only class would be 'images'", "cat, dog", "name train/images as the split"):
        split_of(tmp_path)
    assert split_of(tmp_path, **{"data.train_split": "train/images"}).class_to_idx == {"cat": 0, "dog": 1}


@BOTH
@pytest.mark.parametrize("stray", ["1.png", ".cache/1.png", "cat/.cache/1.png"])
def test_images_in_no_class_folder_or_in_a_hidden_one_are_refused(kind: str, stray: str, tmp_path: Path) -> None:
    where = stray.rpartition("/")[0] or "the split itself"
    with refused(f"images lie in {where!r}", stray, "class's folder"):
        in_either(kind, tmp_path, "cat/1.png", "dog/1.png", stray)


# ---- which files


@BOTH
def test_files_that_are_not_read_are_counted_by_suffix(kind: str, tmp_path: Path) -> None:
    beside = ["notes.txt", "cat/a.TXT", "cat/.DS_Store", "dog/deep/b.heic", "dog/c.heic", "dog/d", ".git/e.f"]
    split = in_either(kind, tmp_path, "cat/1.png", "dog/1.png", *beside)
    assert len(split) == 2
    assert split.unread == {".txt": 2, ".heic": 2, ".DS_Store": 1, "no suffix": 1, ".f": 1}
    assert image_folders.counted(split.unread) == ".heic 2, .txt 2, .DS_Store 1, .f 1, no suffix 1"


@BOTH
@pytest.mark.parametrize("dataset", ["", "torch/folder"])
def test_class_folder_that_ends_up_empty_is_refused_with_what_it_holds(
    kind: str, dataset: str, tmp_path: Path
) -> None:
    with refused("class folder 'dog' holds no image", ".heic 2, .txt 1", "fox", "convert", "remove"):
        in_either(kind, tmp_path, "cat/1.png", "dog/1.heic", "dog/deep/2.heic", "dog/3.txt", "fox/1.txt")
    if kind == "folder":
        with refused("class folder 'dog' holds no image", ".heic 2, .txt 1"):
            split_of(tmp_path, **{"data.dataset": dataset})


@BOTH
def test_class_folder_with_nothing_in_it_is_refused(kind: str, tmp_path: Path) -> None:
    with refused("class folder 'dog' holds no image"):
        in_either(kind, tmp_path, "cat/a/1.png", "cat/b/1.png", "dog/")


@BOTH
def test_split_without_an_image_says_what_it_holds(kind: str, tmp_path: Path) -> None:
    with refused("it holds no image (.txt 2)"):
        in_either(kind, tmp_path, "a.txt", "b.txt")


WRITTEN = {"avif": "AVIF", "bmp": "BMP", "gif": "GIF", "jp2": "JPEG2000", "jpeg": "JPEG", "pcx": "PCX", "ppm": "PPM"}
WRITTEN |= {"pgm": "PPM", "png": "PNG", "tga": "TGA", "tif": "TIFF", "tiff": "TIFF", "webp": "WEBP", "JPG": "JPEG"}
WRITTEN |= {"dib": "DIB", "jfif": "JPEG", "apng": "PNG", "pnm": "PPM", "j2k": "JPEG2000"}


@BOTH
def test_images_of_every_usual_suffix_are_read(kind: str, tmp_path: Path) -> None:
    written = {suffix: name for suffix, name in WRITTEN.items() if name != "AVIF" or features.check("avif")}
    for suffix, name in written.items():
        (tmp_path / "train" / suffix).mkdir(parents=True)
        (tmp_path / "train" / suffix / f"1.{suffix}").write_bytes(picture(120, name))
    if kind == "tar":
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            tar.add(tmp_path / "train", arcname=".")
    split = split_of(tmp_path, **{"data.train_split": "train" if kind == "folder" else "train.tar"})
    assert set(split.class_to_idx or ()) == set(written)
    assert split.unread == {}
    for i in range(len(split)):
        sample = split.dataset[i]  # type: ignore[index]
        assert sample.image is not None, sample.reason


def test_every_suffix_that_is_read_is_one_of_pillow() -> None:
    Image.init()
    readable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    assert image_folders.SUFFIXES - {".avif"} <= readable


def test_files_that_torchvisions_list_leaves_out_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "train/cat/1.png", "train/cat/2.gif", "train/cat/notes.txt", "train/stray.png")
    monkeypatch.setattr(data, "create_dataset", lambda name, **options: ImageFolder(tmp_path / "train"))
    split = split_of(tmp_path, **{"data.dataset": "torch/imagenet"})
    assert len(split) == 1
    assert split.unread == {".gif": 1, ".png": 1, ".txt": 1}


# ---- links, and tar files that are not whole


def test_links_are_followed_but_not_in_a_circle_nor_into_nothing(tmp_path: Path) -> None:
    write(tmp_path, "store/fox/1.png", "train/cat/1.png", "train/dog/1.png")
    (tmp_path / "train/fox").symlink_to(tmp_path / "store/fox")
    (tmp_path / "train/dog/2.png").symlink_to(tmp_path / "store/fox/1.png")
    assert labels(split_of(tmp_path)) == {
        "cat/1.png": "cat",
        "dog/1.png": "dog",
        "dog/2.png": "dog",
        "fox/1.png": "fox",
    }
    (tmp_path / "train/dog/again").symlink_to("..")
    with refused("train/dog/again", "leads back"):
        split_of(tmp_path)
    (tmp_path / "train/dog/again").unlink()
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with refused("train/fox", "leads nowhere"):
        split_of(tmp_path)
    (tmp_path / "train/fox").unlink()
    (tmp_path / "train/cat/night").symlink_to(tmp_path / "store/fox")  # lost images of a class that has others
    with refused("train/cat/night", "leads nowhere"):
        split_of(tmp_path)


def test_folders_of_a_tar_file_may_have_dots_in_their_names(tmp_path: Path) -> None:
    pack(tmp_path / "train.tar", "cat.png/", "cat.png/1.png", "dog/1.png")
    assert len(split_of(tmp_path, **{"data.train_split": "train.tar"})) == 2
    pack(tmp_path / "train.tar", "v1.0/", "cat/1.png", "dog/1.png")
    with refused("class folder 'v1.0' holds no image"):
        split_of(tmp_path, **{"data.train_split": "train.tar"})


def test_folder_that_cannot_be_listed_is_an_error_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "train/cat/1.png", "train/dog/1.png", "train/dog/deep/1.png")
    scandir = os.scandir

    def denied(path: str) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with refused("Permission denied", "dog/deep"):
        split_of(tmp_path)


def linked(path: str, to: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.type, member.linkname = kind, to
    return member


def test_links_within_a_tar_file_are_the_files_they_lead_to(tmp_path: Path) -> None:
    pack(tmp_path / "train.tar", "cat/1.png", "dog/1.png")
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        tar.addfile(linked("dog/hard.png", "cat/1.png", tarfile.LNKTYPE))
        tar.addfile(linked("dog/soft.png", "../cat/1.png", tarfile.SYMTYPE))
        tar.addfile(linked("dog/lost.png", "../fox/1.png", tarfile.SYMTYPE))
    split = split_of(tmp_path, **{"data.train_split": "train.tar"})
    assert labels(split) == {"cat/1.png": "cat"} | {f"dog/{name}.png": "dog" for name in ("1", "hard", "lost", "soft")}
    read = [split.dataset[i].image is not None for i in range(5)]  # type: ignore[index]
    assert read == [True, True, True, False, True]
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        tar.addfile(linked("fox", "../elsewhere/fox", tarfile.SYMTYPE))
    with refused("class folder 'fox' holds no image"):
        split_of(tmp_path, **{"data.train_split": "train.tar"})


def test_tar_file_that_is_cut_off_damaged_or_joined_to_another_is_refused(tmp_path: Path) -> None:
    pack(tmp_path / "train.tar", "cat/1.png", "dog/1.png", "fox/1.png")
    whole = (tmp_path / "train.tar").read_bytes()
    with tarfile.open(tmp_path / "train.tar") as tar:
        third = tar.getmembers()[2].offset
    damaged = bytearray(whole)
    damaged[third + 148] ^= 1  # the checksum of fox/1.png
    for content, words in [(whole[:third], "no end mark"), (damaged, "no end mark"), (whole * 2, "behind its end")]:
        (tmp_path / "train.tar").write_bytes(content)
        with refused("train.tar", words):
            split_of(tmp_path, **{"data.train_split": "train.tar"})


def test_file_that_lies_in_a_tar_file_twice_is_refused(tmp_path: Path) -> None:
    with refused("cat/1.png lies in it twice", "pack it again"):
        in_either("tar", tmp_path, "cat/1.png", "dog/1.png", "./cat/1.png")


def test_archive_that_is_no_tar_file_is_refused(tmp_path: Path) -> None:
    for name in ("train.zip", "train.tar.gz"):
        (tmp_path / name).write_bytes(b"junk")
        with refused(name, "no folder and no .tar file"):
            split_of(tmp_path, **{"data.train_split": name})


# ---- processes


@pytest.mark.parametrize(("changed", "what"), [("a", "number of images"), ("b", "classes"), ("c", "list of files")])
def test_length_classes_and_list_of_a_split_are_compared(
    changed: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = split_of(write(tmp_path / "here", "train/cat/1.png", "train/dog/1.png"))
    other = {"a": "cat/2.png", "b": "fox/1.png", "c": "cat/1.PNG"}[changed]
    write(tmp_path / "there", "train/cat/1.png", "train/dog/1.png", f"train/{other}")
    if changed != "a":
        gone = {"b": "dog", "c": "cat"}[changed]
        (tmp_path / "there/train" / gone / "1.png").unlink()
        if changed == "b":
            (tmp_path / "there/train/dog").rmdir()
    there = split_of(tmp_path / "there")
    world = alone(size=2)
    monkeypatch.setattr(type(world), "gather", lambda self, value: [value, theirs])
    theirs = {f"data.train_split: {key}": text for key, text in there.seen().items()}
    with refused(f"data.train_split: {what}", "on rank 0, but", "on rank 1", "same data"):
        data.agree(world, train=here)
    theirs = {f"data.train_split: {key}": text for key, text in here.seen().items()}
    data.agree(world, train=here)


def test_process_that_alone_is_refused_its_data_names_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    world = alone(size=2)
    monkeypatch.setattr(type(world), "gather", lambda self, value: [value, "no such folder"])
    with refused("rank 1 of 2: no such folder"):
        world.on_each(lambda: 7)
