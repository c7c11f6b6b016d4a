"""Datasets by name, ConvNeXt's transforms, and loaders that give every process its share."""

import hashlib
import itertools
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, Mixup, create_dataset, create_transform
from timm.layers import to_2tuple
from torch import distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import FakeData
from torchvision.datasets.folder import DatasetFolder, default_loader

from ..errors import one_line, shortened
from .config import AugmentConfig, Config, DataConfig
from .digits import Digits
from .distributed import World
from .image_folders import FolderReader, TarReader, unread_beside
from .images import Batch, Images, collate, collate_readable
from .sequences.named import PREFIX, Sequences, open_sequences
from .shards import Shards
from .signals import STOPPING, settle_worker

# timm's and torchvision's own names of a split; with any other name torchvision would quietly take the test images
TRAIN_NAMES = ("train", "training")
QUIET_S = 0.1  # see `_Loader`
FOLDERS = ("", "torch/folder", "torch/image_folder")  # all of class folders; the last two in torchvision's order
VAL_NAMES = ("val", "valid", "validation", "eval", "evaluation", "test")


@dataclass(frozen=True, slots=True)
class Split:
    """One split of the data: images or sequences, over all processes, and its classes by name where it knows them."""

    dataset: Images | Shards | Sequences
    class_to_idx: dict[str, int] | None
    num_classes: int | None = None  # where the dataset tells it without the names
    unread: Counter[str] = field(default_factory=Counter)  # files that are no image, by suffix

    def __len__(self) -> int:
        return len(self.dataset)

    def seen(self) -> dict[str, str]:
        """What every process must have alike, in a few words each."""
        numbered = sorted((self.class_to_idx or {}).items(), key=lambda item: (item[1], item[0]))
        names, sha256 = shortened(name for name, _ in numbered), hashlib.sha256(repr(numbered).encode())
        return {
            "number of images": str(len(self)),
            "classes": f"{len(numbered)}, {names} ({sha256.hexdigest()[:12]})" if numbered else "without names",
            "list of files and labels": self.dataset.digest()[:12],
        }


def create_splits(config: Config, world: World) -> tuple[Split, Split, int]:
    """Training and validation images, and the number of classes; every process must find the same.

    Raises:
        ValueError: on every process, if one of them cannot open a split, or sees another than the rest.
    """

    if config.data.download and world.size > 1:
        raise ValueError("data.download=true writes files: download in one process first, then run without it")

    def create() -> tuple[Split, Split, int]:
        train, val = create_split(config, train=True), create_split(config, train=False)
        return train, val, num_classes(train, val, config.model.num_classes)

    train, val, classes = world.on_each(create)
    agree(world, train=train, val=val)
    return train, val, classes


def agree(world: World, **splits: Split) -> None:
    """Refuse splits that the processes see differently; the keywords are their names in the configuration."""
    if world.size == 1:
        return  # hashing a million names takes a second
    seen = {
        f"data.{name}_split: {what}": text for name, split in splits.items() for what, text in split.seen().items()
    }
    world.agree(seen, "give every process the same data")


def create_split(config: Config, train: bool) -> Split:
    """The training or validation images, transforms attached.

    Raises:
        ValueError: the folder, split or package is missing, or holds no image; never another folder instead.
    """
    if config.data.dataset.startswith(PREFIX):
        return Split(*open_sequences(config, train))
    source = _open(config, train)
    transform = train_transform(config.data, config.augment) if train else eval_transform(config.data)
    reader = getattr(source, "reader", source)
    classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # folder or tar
    dataset: Images | Shards
    if config.data.dataset.startswith("wds/"):
        samples = config.data.train_samples if train else config.data.val_samples
        options = {"training": train, "seed": config.seed, "samples": samples, "upright": config.data.upright}
        dataset = Shards(reader, transform, **options)  # type: ignore[arg-type]
    else:
        dataset = Images(source, transform, config.seed, config.data.upright)
    unread = Counter(getattr(dataset if isinstance(dataset, Shards) else reader, "unread", {}))
    return Split(dataset, classes or None, getattr(source, "num_classes", None), unread)


def _open(config: Config, train: bool) -> Any:
    """timm's dataset of that name, with its failures turned into one line that names the knob."""
    data = config.data
    split, samples = (data.train_split, data.train_samples) if train else (data.val_split, data.val_samples)
    knob = "train_split" if train else "val_split"
    if data.dataset == "digits":
        return Digits(train)
    if data.dataset == "synthetic":
        size = to_2tuple(data.img_size)
        samples = samples or config.optim.global_batch
        return FakeData(samples, (3, *size), config.model.num_classes or 1000, random_offset=0 if train else 2**30)
    root = str(_existing(data, split, knob)) if data.dataset in FOLDERS else _named(data, split, knob)
    try:
        if data.dataset in FOLDERS:
            return ImageDataset(root, reader=_class_folders(root, data.dataset))
        source = create_dataset(
            data.dataset,
            root=root or None,
            split=split,
            search_split=False,
            is_training=train and not data.dataset.startswith("wds/"),  # Shards reads these, not timm
            download=data.download,
            batch_size=config.optim.batch_per_device,
            num_samples=samples,
            seed=config.seed,
        )
        if getattr(source, "loader", None) is default_loader:
            source.loader = Image.open  # torchvision's loader would make deep greys white or black before `decode`
        if isinstance(source, DatasetFolder):
            source.unread = unread_beside(str(source.root), {path for path, _ in source.samples})
        return source
    except (RuntimeError, AssertionError, ImportError, OSError, ValueError, KeyError, tarfile.TarError) as error:
        reason = one_line(error)
        raise ValueError(
            f"data.dataset={data.dataset!r}, data.root={data.root!r}, {knob}={split!r}: {reason}"
        ) from error


def _named(data: DataConfig, split: str, knob: str) -> str:
    """data.root of a dataset of torchvision, of the Hugging Face hub or in shards; refused if it cannot be right."""
    kind, names = data.dataset.partition("/")[0], TRAIN_NAMES if knob == "train_split" else VAL_NAMES
    if kind not in ("torch", "hfds", "wds"):
        raise ValueError(
            f"data.dataset={data.dataset!r} is unknown; use '' for image folders, torch/..., hfds/..., wds/..., "
            "sequence/..., digits or synthetic"
        )
    if kind == "torch" and split not in names:
        raise ValueError(f"data.{knob}={split!r} is no split of {data.dataset}; use {names[0]!r}")
    there = Path(data.root).is_dir() or "://" in data.root or (kind == "torch" and data.download)
    if kind != "hfds" and (not data.root or not there):
        raise ValueError(f"data.root={data.root!r} is no folder; name the one that holds {data.dataset}")
    return data.root


def _class_folders(root: str, dataset: str) -> FolderReader | TarReader:
    if Path(root).is_dir():
        return FolderReader(root, plain=dataset != "")
    if dataset == "" and root.endswith(".tar"):
        return TarReader(root)
    raise ValueError("it is no folder" + (" and no .tar file; unpack it" if dataset == "" else ""))


def _existing(data: DataConfig, split: str, knob: str) -> Path:
    """The folder root/split, which must exist: else timm would try synonyms, and then take the root itself."""
    root = Path(data.root)
    if not data.root or not root.is_dir():
        raise ValueError(f"data.root={data.root!r} is no folder; name the one that holds {split!r}")
    path = root / split
    if not split or not path.exists():
        found = sorted(item.name for item in root.iterdir() if item.is_dir() or item.suffix == ".tar")
        raise ValueError(
            f"data.root={data.root!r} has no {split!r} for data.{knob}; it holds {', '.join(found) or 'no folder'}"
        )
    return path


def num_classes(train: Split, val: Split, wanted: int | None) -> int:
    """The number of classes of the run: the data's, which must agree between the splits and with model.num_classes."""
    if train.class_to_idx != val.class_to_idx:
        extra = sorted(set(train.class_to_idx or ()) ^ set(val.class_to_idx or ()))
        raise ValueError(
            f"training has {len(train.class_to_idx or ())} classes, validation {len(val.class_to_idx or ())}; "
            f"only in one of them: {shortened(extra) or 'none, but their order differs'}"
        )
    # by index: torchvision's ImageNet has several names for one class
    found = len(set(train.class_to_idx.values())) if train.class_to_idx else train.num_classes or wanted
    if found is None:
        raise ValueError("this dataset does not say how many classes it has; set model.num_classes")
    if wanted is not None and wanted != found:
        raise ValueError(f"model.num_classes={wanted}, but the data has {found} classes; null follows the data")
    return int(found)


def class_names(class_to_idx: dict[str, int]) -> list[str]:
    """The names of the classes, by number. If a class has several, as in torchvision's ImageNet, commas join them."""
    names: list[list[str]] = [[] for _ in range(max(class_to_idx.values(), default=-1) + 1)]
    for name, number in class_to_idx.items():
        names[number].append(str(name))
    return [", ".join(each) for each in names]


def train_transform(data: DataConfig, augment: AugmentConfig) -> Any:
    """Random resized crop, flip, RandAugment, normalisation, random erasing: ConvNeXt's order; mixing comes later."""
    try:
        return create_transform(
            data.img_size,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment or None,
            **_shared_options(data),
            re_prob=augment.reprob,
            re_mode=augment.remode,
            re_count=augment.recount,
        )
    except (AssertionError, ValueError, KeyError) as error:  # all other options were checked by the configuration
        raise ValueError(f"augment.auto_augment={augment.auto_augment!r} is no policy of timm") from error


def eval_transform(data: DataConfig) -> Any:
    """Resize and centre crop, or the squashed resize, then normalisation."""
    return create_transform(
        data.img_size,
        is_training=False,
        **_shared_options(data),
        crop_pct=data.crop_pct,
        crop_mode=data.crop_mode,
    )


def _shared_options(data: DataConfig) -> dict[str, Any]:
    """timm's prefetcher is off: it mixes before it erases, and in 8 bits."""
    return {"interpolation": data.interpolation, "mean": data.mean, "std": data.std, "use_prefetcher": False}


def create_mixup(augment: AugmentConfig, classes: int) -> Mixup | None:
    """Mixup and cutmix over whole batches, on the device, after random erasing; None where both are off."""
    if augment.mixup == 0 and augment.cutmix == 0:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        mode=augment.mixup_mode,
        label_smoothing=augment.smoothing,
        num_classes=classes,
    )


class _Order(DistributedSampler[Any]):
    """torch's order of an epoch from image ``start`` on; the last images, too few for all processes, are left out."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.start, None)


class _Loader(DataLoader[Any]):
    """A loader whose workers are forked while gloo's threads rest.

    Right after a collective operation these threads attach to Python for an instant. A fork at that instant hangs the
    child for ever on Python 3.11: it waits in PyOS_AfterFork_Child for a lock whose holder was not forked. This was
    seen once in some hundred forks. A short wait gives the threads time to finish.
    """

    def __iter__(self) -> Any:
        if self.num_workers and dist.is_initialized():
            time.sleep(QUIET_S)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # in the workers until `settle_worker`
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TrainLoader:
    """Shuffled batches of one epoch for this process; the images that do not fill a global batch are left out."""

    def __init__(self, split: Split, config: Config, world: World) -> None:
        self.dataset, self.world, self.batch = split.dataset, world, config.optim.batch_per_device
        self.order: _Order | None = None
        if not isinstance(self.dataset, Shards):
            self.order = _Order(self.dataset, world.size, world.rank, seed=config.seed, drop_last=True)
        self.loader = _Loader(
            self.dataset,
            batch_size=self.batch,
            sampler=self.order,
            drop_last=True,
            collate_fn=partial(collate, name=self.dataset.name),
            **_loader_options(config, world),
        )

    def epoch(self, number: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of an epoch without the first ``skip``, which are not loaded.

        Batches depend on the seed, the epoch, and for shards on the workers; not on what was drawn or loaded before.
        """
        if not isinstance(self.dataset, Shards):
            assert self.order is not None
            self.dataset.epoch = number
            self.order.set_epoch(number)
            self.order.start = skip * self.batch
        else:
            self.dataset.plan(number, self.world.rank, self.world.size, self.batch, skip)
        return iter(self.loader)


def create_eval_loader(split: Split, config: Config, world: World) -> DataLoader[Any]:
    """Each image exactly once over all processes, whatever their number: a stride of the indices, never padded."""
    sampler = None
    if not isinstance(split.dataset, Shards):
        sampler = range(world.rank, len(split), world.size)
    else:
        split.dataset.plan(0, world.rank, world.size, config.optim.batch_per_device)
    return _Loader(
        split.dataset,
        batch_size=config.optim.batch_per_device,
        sampler=sampler,
        collate_fn=collate_readable,
        **_loader_options(config, world),
    )


def _loader_options(config: Config, world: World) -> dict[str, Any]:
    return {
        "num_workers": config.data.workers,
        "pin_memory": config.data.pin_memory and world.device.type == "cuda",
        "worker_init_fn": settle_worker,
    }
