"""Data: what is opened and what is refused, ConvNeXt's transforms, and how the processes share the images."""

import io
import struct
import sys
import tarfile
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms as tv
from training_helpers import CONFIGS, alone, micro_config, write_images

from sgconvnext.training import data, optim, rng
from sgconvnext.training.config import Config, load_config
from sgconvnext.training.data import Split
from sgconvnext.training.images import Images

PLAIN = {"data.mean": [0.0, 0.0, 0.0], "data.std": [1.0, 1.0, 1.0], "model.num_classes": None}


def folder_config(root: Path, **changes: Any) -> Config:
    """Image folders under root, pixels in 0..1."""
    return micro_config(**(PLAIN | {"data.dataset": "", "data.root": str(root)} | changes))


def both_splits(config: Config) -> tuple[Split, Split]:
    return data.create_split(config, train=True), data.create_split(config, train=False)


def classes(config: Config) -> int:
    return data.num_classes(*both_splits(config), config.model.num_classes)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return write_images(tmp_path / "set", {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 2}})


def samples(split: Split) -> list[Any]:
    return [split.dataset[i] for i in range(len(split))]


def greys(split: Split) -> list[tuple[float, int]]:
    return [(float(sample.image.mean()), sample.target) for sample in samples(split)]


# ---- folders and tar files


def packed(root: Path, **changes: Any) -> Config:
    """The folders of root as train.tar and val.tar."""
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, arcname=".")
    return folder_config(root, **({"data.train_split": "train.tar", "data.val_split": "val.tar"} | changes))


@pytest.mark.parametrize("dataset", ["", "torch/folder", "torch/image_folder"])
def test_folder_of_class_folders_is_opened(dataset: str, folders: Path) -> None:
    config = folder_config(folders, **{"data.dataset": dataset})
    train, val = both_splits(config)
    assert (len(train), len(val)) == (5, 3)
    assert train.class_to_idx == val.class_to_idx == {"cat": 0, "dog": 1}
    assert data.num_classes(train, val, None) == 2
    assert sorted(train.dataset[i].target for i in range(5)) == [0, 0, 0, 1, 1]
    image, target, *_ = val.dataset[2]
    assert torch.equal(image, torch.full((3, 32, 32), 49 / 255))  # the eighth image that was written
    assert target == 1


def test_tar_file_is_a_split(folders: Path) -> None:
    for got, want in zip(both_splits(packed(folders)), both_splits(folder_config(folders)), strict=True):
        assert len(got) == len(want)
        assert sorted(greys(got)) == sorted(greys(want))


def test_tar_files_tell_their_classes(folders: Path, tmp_path: Path) -> None:
    train, val = both_splits(packed(folders))
    assert train.class_to_idx == val.class_to_idx == {"cat": 0, "dog": 1}
    assert data.num_classes(train, val, None) == 2
    others = write_images(tmp_path / "others", {"train": {"cat": 1, "dog": 1}, "val": {"cat": 1, "fox": 1}})
    with refused("dog, fox"):
        classes(packed(others, **{"model.num_classes": 2}))


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize("train", [True, False])
def test_missing_split_is_refused_and_no_other_folder_taken(train: bool, dataset: str, folders: Path) -> None:
    name = "train" if train else "val"
    (folders / name).rename(folders / ("training" if train else "validation"))  # names that timm would find
    config = folder_config(folders, **{"data.dataset": dataset})
    there = "training, val" if train else "train, validation"
    with refused(str(folders), f"has no '{name}'", f"data.{name}_split", f"it holds {there}"):
        data.create_split(config, train=train)


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_class_may_have_the_name_of_a_split(dataset: str, tmp_path: Path) -> None:
    counts = {"train": 1, "val": 2}
    write_images(tmp_path, {"train": counts, "val": counts})  # timm would search on, and find train/train
    train, val = both_splits(folder_config(tmp_path, **{"data.dataset": dataset}))
    assert (len(train), len(val)) == (3, 3)
    assert train.class_to_idx == val.class_to_idx == {"train": 0, "val": 1}


@pytest.mark.parametrize("stray", [".", ".checkpoints"])
def test_images_outside_a_class_folder_are_refused(stray: str, folders: Path) -> None:
    image = next((folders / "train").rglob("*.png"))
    (folders / "train" / stray).mkdir(exist_ok=True)
    (folders / "train" / stray / "stray.png").write_bytes(image.read_bytes())
    with refused(str(folders), "train", "class"):
        data.create_split(folder_config(folders), train=True)


def test_empty_split_name_does_not_mean_the_root(folders: Path) -> None:
    with refused("has no ''", "data.val_split", "train, val"):
        data.create_split(folder_config(folders, **{"data.val_split": ""}), train=False)


@pytest.mark.parametrize("root", ["", "/nowhere/at/all"])
@pytest.mark.parametrize("dataset", ["", "torch/image_folder", "torch/cifar10", "torch/fashion_mnist", "wds/toy"])
def test_missing_root_is_refused(dataset: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(f"data.root={root!r}", "name the one that holds"):
        data.create_split(micro_config(**{"data.dataset": dataset, "data.root": root}), train=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_folder_without_images_is_refused(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with refused(str(tmp_path), "train_split='train'"):
        data.create_split(folder_config(tmp_path, **{"data.dataset": dataset}), train=True)


@pytest.mark.parametrize(
    ("val", "counts", "names"),
    [
        ({"cat": 1, "fox": 1}, ("2 classes", "validation 2"), "dog, fox"),
        ({"cat": 1}, ("2 classes", "validation 1"), "dog"),
        ({"cat": 1, "dog": 1, "fox": 1}, ("2 classes", "validation 3"), "fox"),
        (dict.fromkeys("abcdefgh", 1), ("2 classes", "validation 8"), "a, b, c, cat, d, ..."),
    ],
    ids=["renamed", "missing", "extra", "many"],
)
def test_classes_that_differ_between_the_splits_are_named(
    val: dict[str, int], counts: tuple[str, str], names: str, tmp_path: Path
) -> None:
    write_images(tmp_path, {"train": {"cat": 1, "dog": 1}, "val": val})
    with refused(*counts, f"only in one of them: {names}"):
        classes(folder_config(tmp_path))


@pytest.mark.parametrize("wanted", [1, 3, 1000])
def test_number_of_classes_unlike_the_data_is_refused(wanted: int, folders: Path) -> None:
    assert classes(folder_config(folders, **{"model.num_classes": 2})) == 2
    with refused(f"model.num_classes={wanted}", "2 classes", "null"):
        classes(folder_config(folders, **{"model.num_classes": wanted}))


def test_dataset_that_cannot_tell_its_classes_needs_them_from_the_user() -> None:
    unknown = data.create_split(micro_config(), train=True)
    unknown = Split(unknown.dataset, None)
    with refused("set model.num_classes"):
        data.num_classes(unknown, unknown, None)
    assert data.num_classes(unknown, unknown, 7) == 7


@pytest.mark.parametrize("dataset", ["imagefolder", "digit", "folder/x", "Torch"])
def test_unknown_dataset_is_refused_with_those_that_exist(dataset: str, tmp_path: Path) -> None:
    with refused(f"data.dataset={dataset!r}", "digits", "synthetic", "torch/", "hfds/", "wds/"):
        data.create_split(folder_config(tmp_path, **{"data.dataset": dataset}), train=True)


# ---- torchvision's datasets


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Five training and three test images of uniform grey in torchvision's files."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 5), ("t10k", 3)):
        pixels = b"".join(bytes([10 * (i + 1)] * 28 * 28) for i in range(count))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    return tmp_path


def fashion_config(root: Path, **changes: Any) -> Config:
    return folder_config(root, **({"data.dataset": "torch/fashion_mnist"} | changes))


@pytest.mark.parametrize("names", [("train", "val"), ("training", "test"), ("train", "validation")])
def test_torchvision_set_is_opened_and_its_grey_images_become_rgb(names: tuple[str, str], fashion: Path) -> None:
    config = fashion_config(fashion, **{"data.train_split": names[0], "data.val_split": names[1]})
    train, val = both_splits(config)
    assert (len(train), len(val)) == (5, 3)
    assert data.num_classes(train, val, None) == 10
    for split in (train, val):
        for i in range(len(split)):
            sample = split.dataset[i]
            assert torch.equal(sample.image, torch.full((3, 32, 32), 10 * (i + 1) / 255))
            assert sample.target == i


@pytest.mark.parametrize(("knob", "name"), [("train_split", "trian"), ("val_split", "tset"), ("train_split", "test")])
def test_misspelt_split_of_a_torchvision_set_is_refused(knob: str, name: str, fashion: Path) -> None:
    with refused(f"data.{knob}={name!r}", "torch/fashion_mnist", "use '"):
        both_splits(fashion_config(fashion, **{f"data.{knob}": name}))


def test_torchvision_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for dataset in ("torch/fashion_mnist", "torch/cifar10", "torch/no_such_set"):
        with refused(f"data.dataset={dataset!r}", str(tmp_path)):
            data.create_split(folder_config(tmp_path, **{"data.dataset": dataset}), train=True)


# ---- digits, synthetic, hfds


def digits_config(**changes: Any) -> Config:
    return micro_config(**(PLAIN | {"data.dataset": "digits"} | changes))


def test_digits_hold_out_a_fifth_of_each_class() -> None:
    from sklearn.datasets import load_digits

    train, val = both_splits(digits_config())
    assert (len(train), len(val)) == (1437, 360)
    assert data.num_classes(train, val, None) == 10
    per_class = Counter(load_digits().target.tolist())
    for digit, count in Counter(val.dataset.source.targets).items():
        assert abs(count - per_class[digit] / 5) < 1
    image, target, *_ = train.dataset[0]
    assert image.shape == (3, 32, 32)
    assert float(image.max()) > 0.5
    assert target in range(10)


def test_digits_of_the_two_splits_are_disjoint_and_together_all() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    want = Counter((np.uint8(i * (255 / 16)).tobytes(), t) for i, t in zip(digits.images, digits.target, strict=True))
    got: Counter[Any] = Counter()
    for split in both_splits(digits_config()):
        got.update(
            (i.tobytes(), t) for i, t in zip(split.dataset.source.images, split.dataset.source.targets, strict=True)
        )
    assert got == want


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with refused("data.dataset=digits", "pip install"):
        data.create_split(digits_config(), train=True)


def test_hugging_face_set_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with refused("data.dataset='hfds/mnist'", "datasets"):
        data.create_split(folder_config(tmp_path, **{"data.dataset": "hfds/mnist"}), train=True)


def test_synthetic_images_are_reproducible_and_differ_between_the_splits() -> None:
    sizes = {"data.train_samples": 40, "data.val_samples": 9, "data.crop_pct": 1.0}  # transforms that change nothing
    config = micro_config(**sizes, **{"model.num_classes": 7})
    train, val = both_splits(config)
    assert (len(train), len(val)) == (40, 9)
    assert data.num_classes(train, val, 7) == 7
    assert {sample.target for sample in samples(train)} == set(range(7))
    again, _ = both_splits(config)
    assert torch.equal(train.dataset[3].image, again.dataset[3].image)
    images = [sample.image.numpy().tobytes() for split in (train, val) for sample in samples(split)]
    assert len(set(images)) == 49


def test_synthetic_set_is_one_global_batch_of_imagenets_classes_unless_told() -> None:
    unset = {"data.train_samples": None, "data.val_samples": None, "model.num_classes": None}
    train, val = both_splits(micro_config(**unset))
    assert len(train) == len(val) == 16
    assert data.num_classes(train, val, None) == 1000


# ---- webdataset's shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Ten training images in two shards and seven validation images in one; image i has grey 10 i and class i % 3."""
    for name, numbers in {"train-000": range(5), "train-001": range(5, 10), "val-000": range(7)}.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number in numbers:
                png = io.BytesIO()
                Image.fromarray(np.full((32, 32, 3), 10 * number, "uint8")).save(png, "png")
                for suffix, content in {"png": png.getvalue(), "cls": str(number % 3).encode()}.items():
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path


def shards_config(root: Path, batch: int, **changes: Any) -> Config:
    names = {"data.train_split": "train-{000..001}.tar", "data.val_split": "val-000.tar"}
    sizes = {"data.train_samples": 10, "data.val_samples": 7, "model.num_classes": 3}
    batches = {"optim.global_batch": batch, "optim.batch_per_device": batch}
    return folder_config(root, **({"data.dataset": "wds/toy"} | names | sizes | batches | changes))


def numbers(images: torch.Tensor) -> list[int]:
    """Which images these are, by their grey."""
    return (images[:, 0, 0, 0] * 25.5).round().int().tolist()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shards_are_trained_on_once_an_epoch(shards: Path) -> None:
    config = shards_config(shards, batch=5)
    split = data.create_split(config, train=True)
    assert len(split) == 10
    loader = data.TrainLoader(split, config, alone())
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        assert [len(batch.targets) for batch in batches] == [5, 5]
        seen = [number for batch in batches for number in numbers(batch.images)]
        assert sorted(seen) == list(range(10))
        for batch in batches:
            assert batch.targets.tolist() == [number % 3 for number in numbers(batch.images)]


def test_shards_are_evaluated_once_each(shards: Path) -> None:
    config = shards_config(shards, batch=3)
    split = data.create_split(config, train=False)
    batches = list(data.create_eval_loader(split, config, alone()))
    assert len(split) == 7
    assert [number for batch in batches for number in numbers(batch.images)] == list(range(7))
    assert [target for batch in batches for target in batch.targets.tolist()] == [0, 1, 2, 0, 1, 2, 0]
    assert data.num_classes(data.create_split(config, train=True), split, 3) == 3


def test_shards_count_their_images_and_need_the_number_of_classes(shards: Path) -> None:
    counted = shards_config(shards, 5, **{"data.train_samples": None, "data.val_samples": None})
    assert [len(split) for split in both_splits(counted)] == [10, 7]
    with refused("set model.num_classes"):
        classes(shards_config(shards, 5, **{"model.num_classes": None}))


def test_missing_shards_are_refused_before_training(shards: Path) -> None:
    with refused("trian-"):
        data.create_split(shards_config(shards, 5, **{"data.train_split": "trian-{000..001}.tar"}), train=True)


@pytest.mark.parametrize("batch", [3, 4, 6, 10, 11])
def test_number_of_images_in_shards_is_not_rounded_up_to_batches(batch: int, shards: Path) -> None:
    assert len(data.create_split(shards_config(shards, batch), train=True)) == 10


@pytest.mark.parametrize(("size", "workers"), [(2, 0), (2, 1), (3, 2)])
def test_shards_are_shared_out_over_processes(size: int, workers: int, shards: Path) -> None:
    config = shards_config(shards, batch=1, **{"data.workers": workers})
    train, val = both_splits(config)
    loaders = [data.TrainLoader(train, config, alone(rank, size)) for rank in range(size)]
    shares = [[number for batch in loader.epoch(3) for number in numbers(batch.images)] for loader in loaders]
    assert {len(share) for share in shares} == {10 // size}
    assert len(set(chain(*shares))) == 10 // size * size
    seen: list[int] = []
    for rank in range(size):
        seen += chain(*(numbers(batch.images) for batch in data.create_eval_loader(val, config, alone(rank, size))))
    assert sorted(seen) == list(range(7))


# ---- transforms


def recipe() -> Config:
    return load_config(CONFIGS / "imagenet.yaml")


def test_training_transforms_come_in_convnexts_order_with_its_numbers() -> None:
    config = recipe()
    steps = data.train_transform(config.data, config.augment).transforms
    names = [type(step).__name__ for step in steps]
    assert [name.removeprefix("Maybe") for name in names] == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "ToTensor",
        "Normalize",
        "RandomErasing",
    ]
    crop, flip, policy, _, normalize, erasing = steps
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == tv.InterpolationMode.BICUBIC
    assert flip.p == 0.5
    assert policy.num_layers == 2
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in policy.ops} == {(0.5, 9, 0.5)}
    assert torch.as_tensor(normalize.mean).tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert torch.as_tensor(normalize.std).tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert (erasing.probability, erasing.min_count, erasing.max_count) == (0.25, 1, 1)
    assert erasing.per_pixel


def test_random_erasing_fills_after_normalisation() -> None:
    config = micro_config(**{"augment.reprob": 1.0, "augment.remode": "const"})
    black = Image.new("RGB", (32, 32))
    image = data.train_transform(config.data, config.augment)(black)
    background = torch.tensor(config.data.mean) / torch.tensor(config.data.std) * -1
    erased = (image == 0).all(0)
    assert 0 < int(erased.sum()) < 32 * 32
    assert torch.allclose(image[:, ~erased], background[:, None].expand(3, int((~erased).sum())), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "absent", "present"),
    [
        ({"augment.reprob": 0.0}, "RandomErasing", "Normalize"),
        ({"augment.hflip": 0.0}, "RandomHorizontalFlip", "Normalize"),
        ({"augment.auto_augment": "", "augment.color_jitter": 0.4}, "RandAugment", "ColorJitter"),
        ({"augment.auto_augment": "rand-m9", "augment.color_jitter": 0.4}, "ColorJitter", "RandAugment"),
    ],
    ids=lambda item: str(item)[:30],
)
def test_augmentation_that_is_off_leaves_no_step(changes: dict[str, Any], absent: str, present: str) -> None:
    on = {"augment.reprob": 0.25, "augment.hflip": 0.5}
    config = micro_config(**(on | changes))
    names = [type(step).__name__ for step in data.train_transform(config.data, config.augment).transforms]
    assert absent not in names
    assert present in names


SOURCES = [(300, 400), (333, 217), (224, 224), (100, 80), (1001, 256)]


def pixels(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), "uint8"))


@pytest.mark.parametrize("size", SOURCES, ids=str)
def test_evaluation_at_224_px_is_resize_256_and_centre_crop_to_the_pixel(size: tuple[int, int]) -> None:
    want = tv.Compose(
        [
            tv.Resize(256, tv.InterpolationMode.BICUBIC),
            tv.CenterCrop(224),
            tv.ToTensor(),
            tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    got = data.eval_transform(recipe().data)(pixels(*size))
    assert got.shape == (3, 224, 224)
    assert torch.equal(got, want(pixels(*size)))


@pytest.mark.parametrize("size", SOURCES, ids=str)
def test_evaluation_at_384_px_resizes_both_sides_and_crops_nothing(size: tuple[int, int]) -> None:
    want = tv.Compose(
        [
            tv.Resize((384, 384), tv.InterpolationMode.BICUBIC),
            tv.ToTensor(),
            tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    got = data.eval_transform(load_config(CONFIGS / "finetune_384.yaml").data)(pixels(*size))
    assert torch.equal(got, want(pixels(*size)))


def test_mixup_has_the_recipes_numbers_and_is_absent_where_both_are_off() -> None:
    mixup = data.create_mixup(recipe().augment, 1000)
    assert mixup is not None
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (mixup.label_smoothing, mixup.num_classes, mixup.mode, mixup.cutmix_minmax) == (0.1, 1000, "batch", None)
    assert mixup.mixup_enabled
    assert data.create_mixup(micro_config().augment, 10) is None
    for only in ("augment.mixup", "augment.cutmix"):
        assert data.create_mixup(micro_config(**{only: 0.5}).augment, 10) is not None


def test_mixed_targets_are_smoothed_shares_of_two_classes() -> None:
    mixup = data.create_mixup(micro_config(**{"augment.mixup": 0.8, "augment.smoothing": 0.1}).augment, 10)
    assert mixup is not None
    _, targets = mixup(torch.randn(4, 3, 32, 32), torch.arange(4))
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 4, rel=1e-5)
    assert targets[:, 4:].unique().tolist() == pytest.approx([0.01], rel=1e-5)  # 0.1 / 10
    assert torch.equal(targets[0, [0, 3]], targets[3, [3, 0]])  # the batch and its reverse, with one weight


# ---- loaders


class Indices(Dataset[tuple[Any, int]]):
    """Item i is an image of the red i, and the class -i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.new("RGB", (1, 1), (index, 0, 0)), -index


def indices(length: int) -> Split:
    """A split whose images are the tensors 0, 1, 2, ..."""
    return Split(Images(Indices(length), lambda image: torch.tensor(image.getpixel((0, 0))[0]), seed=0), None)


def train_batches(length: int, per_device: int, rank: int, size: int, epoch: int, **changes: Any) -> list[list[int]]:
    config = micro_config(**({"optim.batch_per_device": per_device} | changes))
    loader = data.TrainLoader(indices(length), config, alone(rank, size))
    return [batch.images.tolist() for batch in loader.epoch(epoch)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("length", [16, 21, 40])
def test_batches_of_the_processes_together_are_the_batch_of_one_process(length: int, workers: int) -> None:
    knobs = {"data.workers": workers, "seed": 5}
    whole = train_batches(length, 8, 0, 1, epoch=3, **knobs)
    shares = [train_batches(length, 4, rank, 2, epoch=3, **knobs) for rank in range(2)]
    assert len(whole) == length // 8
    for update, batch in enumerate(whole):
        first, second = shares[0][update], shares[1][update]
        assert len(first) == len(second) == 4
        assert sorted(first + second) == sorted(batch)
    micro = train_batches(length, 2, 0, 1, epoch=3, **knobs)  # accumulation of 4
    assert [list(chain(*micro[4 * i : 4 * i + 4])) for i in range(len(whole))] == whole


def test_epochs_are_shuffled_anew_and_reproducibly() -> None:
    def order(epoch: int, seed: int = 0, rank: int = 0, size: int = 1) -> list[int]:
        torch.manual_seed(torch.seed())  # whatever the process drew before
        return list(chain(*train_batches(40, 4, rank, size, epoch, seed=seed)))

    assert sorted(order(0)) == list(range(40))
    assert order(0) != list(range(40))
    assert order(0) == order(0)
    assert len({tuple(order(epoch)) for epoch in range(4)}) == 4
    assert len({tuple(order(1, seed)) for seed in range(4)}) == 4
    assert not set(order(1, rank=0, size=2)) & set(order(1, rank=1, size=2))


def test_one_loader_gives_an_epoch_the_same_order_whichever_came_before() -> None:
    loader = data.TrainLoader(indices(40), micro_config(), alone())
    first = [batch.images.tolist() for batch in loader.epoch(2)]
    assert [batch.images.tolist() for batch in loader.epoch(0)] != first
    assert [batch.images.tolist() for batch in loader.epoch(2)] == first


def test_every_epoch_holds_enough_full_batches_for_its_updates() -> None:
    for length in range(12, 40):
        for size, per_device, accumulation in [(1, 4, 1), (1, 4, 3), (2, 3, 2), (3, 4, 1), (3, 2, 2)]:
            batches = train_batches(length, per_device, size - 1, size, epoch=0)
            updates = optim.updates_per_epoch(length, per_device * size * accumulation)
            assert len(batches) >= updates * accumulation, (length, size, per_device, accumulation)
            assert {len(batch) for batch in batches} == {per_device}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip", [0, 1, 4, 9, 10])
def test_rest_of_an_epoch_is_the_epoch_without_its_beginning_whatever_the_workers(skip: int, workers: int) -> None:
    whole = [batch.images.tolist() for batch in data.TrainLoader(indices(40), micro_config(**FOUR), alone()).epoch(2)]
    loader = data.TrainLoader(indices(40), micro_config(**(FOUR | {"data.workers": workers})), alone())
    assert [batch.images.tolist() for batch in loader.epoch(2, skip=skip)] == whole[skip:]
    assert [batch.images.tolist() for batch in loader.epoch(2)] == whole  # the next time, nothing is skipped


FOUR = {"optim.batch_per_device": 4}


def test_augmentation_of_an_image_depends_on_seed_epoch_and_image_alone(folders: Path) -> None:
    random_crop = {"augment.scale": [0.1, 1.0], "augment.auto_augment": "rand-m9-mstd0.5-inc1", "augment.reprob": 1.0}

    def images(epoch: int, workers: int = 0, skip: int = 0, **changes: Any) -> dict[int, torch.Tensor]:
        batch = {"optim.batch_per_device": 1, "data.workers": workers}
        config = folder_config(folders, **(random_crop | batch | changes))
        loader = data.TrainLoader(data.create_split(config, train=True), config, alone())
        torch.manual_seed(torch.seed())  # whatever the process drew before
        return {int(batch.places): batch.images for batch in loader.epoch(epoch, skip)}

    first = images(0)
    for again in (images(0), images(0, workers=2), images(0, skip=2)):
        assert all(torch.equal(image, first[place]) for place, image in again.items())
    for other in (images(1), images(0, seed=1)):
        assert not any(torch.equal(image, first[place]) for place, image in other.items())


def test_loading_draws_no_random_number_from_the_run(folders: Path) -> None:
    config = folder_config(folders, **{"augment.scale": [0.1, 1.0], "augment.reprob": 1.0, **FOUR})
    loader = data.TrainLoader(data.create_split(config, train=True), config, alone())
    batches = loader.epoch(0)
    before = rng.state(torch.device("cpu"))
    assert len(next(batches).targets) == 4
    after = rng.state(torch.device("cpu"))
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["python"][1], after["python"][1])
    assert torch.equal(before["numpy"][1], after["numpy"][1])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(("length", "workers"), [(1, 0), (5, 0), (5, 2), (10, 0)])
def test_evaluation_covers_every_image_exactly_once(length: int, size: int, workers: int) -> None:
    config = micro_config(**{"optim.batch_per_device": 2, "data.workers": workers})
    split = indices(length)
    seen: list[int] = []
    for rank in range(size):
        for batch in data.create_eval_loader(split, config, alone(rank, size)):
            assert batch.targets.tolist() == [-i for i in batch.images.tolist()]
            seen += batch.images.tolist()
    assert sorted(seen) == list(range(length))
