"""Shards: every sample once for whichever ranks and workers, epochs taken up in their middle, and what is refused."""

import io
import json
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader

from sgconvnext.training import shards as module
from sgconvnext.training.images import FAULTS, UNREADABLE, Batch, collate, collate_readable
from sgconvnext.training.shards import Shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")

LENGTHS = (5, 3, 9)
TOTAL = sum(LENGTHS)
NAMES = [f"train-{i:03d}.tar" for i in range(3)]
BRACES = "train-{000..002}.tar"
Files = dict[str, bytes]


def picture(number: int) -> bytes:
    """A small png whose grey is its number."""
    png = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, "uint8")).save(png, "png")
    return png.getvalue()


def files_of(number: int) -> Files:
    return {"png": picture(number), "cls": b"%d\n" % (number % 3)}


def pack(path: Path, samples: dict[str, Files], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """5 + 3 + 9 images, numbered through; image i has grey i and class i % 3."""
    for name, length, begin in zip(NAMES, LENGTHS, (0, 5, 8), strict=True):
        pack(tmp_path / name, {f"{i:04d}": files_of(i) for i in range(begin, begin + length)})
    return tmp_path


def write_info(root: Path, lengths: Any = LENGTHS, **changes: Any) -> None:
    split = {"name": "train", "num_samples": sum(lengths), "filenames": NAMES, "shard_lengths": lengths} | changes
    (root / "_info.json").write_text(json.dumps({"splits": {"train": split}}))


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def augmented(image: Image.Image) -> Tensor:
    """A picture of noise from each of the three generators that transforms use."""
    return as_tensor(image) + torch.rand(3, 4, 4) + random.random() + np.random.random()


def open_reader(root: Path, split: str = BRACES, **options: Any) -> Any:
    return create_dataset("wds/toy", root=str(root), split=split, is_training=True, num_samples=1, **options).reader


def open_shards(root: Path, split: str = BRACES, training: bool = True, seed: int = 0, **options: Any) -> Shards:
    return Shards(open_reader(root, split), **({"transform": as_tensor, "training": training, "seed": seed} | options))


def load(shards: Shards, batch: int, workers: int, **plan: int) -> list[Batch]:
    """The batches of one rank, as training and evaluation load them."""
    shards.plan(**({"epoch": 0, "rank": 0, "size": 1, "batch": batch} | plan))
    collated = collate if shards.training else collate_readable
    return list(DataLoader(shards, batch_size=batch, num_workers=workers, collate_fn=collated))


def numbers(batches: list[Batch]) -> list[int]:
    """Which images these are, by their grey."""
    return [int(grey) for batch in batches for grey in batch.images[:, 0, 0, 0].tolist()]


def read(shards: Shards) -> list[int]:
    """The images in the order they come in this process."""
    return [int(sample.image[0, 0, 0]) for sample in shards if sample.image is not None]


# ---- every sample once


@pytest.mark.parametrize(
    ("size", "batch", "workers"), [(1, 1, 0), (1, 2, 1), (2, 2, 2), (3, 2, 3), (3, 2, 0), (1, 7, 2)]
)
def test_training_sees_every_sample_once_but_those_that_fill_no_global_batch(
    size: int, batch: int, workers: int, root: Path
) -> None:
    shards = open_shards(root)
    shares = [load(shards, batch, workers, rank=rank, size=size) for rank in range(size)]
    for share in shares:
        assert [len(one.targets) for one in share] == [batch] * (TOTAL // (size * batch))
        assert [target for one in share for target in one.targets.tolist()] == [i % 3 for i in numbers(share)]
    seen = [number for share in shares for number in numbers(share)]
    assert len(seen) == len(set(seen)) == TOTAL // (size * batch) * size * batch
    assert set(seen) <= set(range(TOTAL))


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (1, 3), (2, 1), (3, 2), (7, 0), (7, 2)])
def test_evaluation_sees_every_sample_once(size: int, workers: int, root: Path) -> None:
    shards = open_shards(root, training=False)
    share = [batch for rank in range(size) for batch in load(shards, 3, workers, rank=rank, size=size)]
    assert sorted(numbers(share)) == list(range(TOTAL))
    assert sorted(place for batch in share for place in batch.places.tolist()) == list(range(TOTAL))
    assert [target for batch in share for target in batch.targets.tolist()] == [i % 3 for i in numbers(share)]


def test_evaluation_in_one_process_keeps_the_order_of_the_shards(root: Path) -> None:
    assert numbers(load(open_shards(root, training=False), 4, 0)) == list(range(TOTAL))


def test_ranges_are_shared_evenly_among_ranks_and_workers(root: Path) -> None:
    shards = open_shards(root, training=False)
    shares = [numbers(load(shards, 17, 0, rank=rank, size=4)) for rank in range(4)]
    assert [len(share) for share in shares] == [4, 4, 4, 5]


# ---- order


def test_order_follows_from_seed_and_epoch_alone(root: Path) -> None:
    def order(epoch: int, seed: int = 0) -> tuple[int, ...]:
        torch.manual_seed(torch.seed())  # whatever the process drew before
        random.seed()
        return tuple(numbers(load(open_shards(root, seed=seed), 1, 2, epoch=epoch)))

    assert order(1) == order(1)
    assert len({order(epoch) for epoch in range(4)}) == 4
    assert len({order(1, seed) for seed in range(4)}) == 4


def test_epoch_is_the_same_whichever_came_before(root: Path) -> None:
    shards = open_shards(root)
    first = numbers(load(shards, 2, 0, epoch=2))
    assert numbers(load(shards, 2, 0, epoch=0)) != first
    assert numbers(load(shards, 2, 0, epoch=2)) == first


def test_shards_and_the_samples_within_a_range_are_both_shuffled(root: Path) -> None:
    shards = open_shards(root)
    starts = set()
    for epoch in range(12):
        shards.plan(epoch, rank=0, size=1, batch=1)
        starts.add(shards.name(0))
        places = [sample.place for sample in shards]
        assert sorted(places) == list(range(TOTAL))
        assert places != sorted(places)
    assert starts == {open_shards(root, seed=seed).name(0) for seed in range(12)}
    assert starts == {f"{name}, sample 0" for name in NAMES}


def test_ranks_and_workers_shuffle_their_ranges_differently(root: Path) -> None:
    pack(root / "train-000.tar", {f"{i:04d}": files_of(i) for i in range(40)})
    shards = open_shards(root, "train-000.tar")
    orders = set()
    for rank in range(2):
        batches = load(shards, 1, 2, rank=rank, size=2)
        for worker in range(2):
            places = [int(batch.places) for batch in batches[worker::2]]
            assert sorted(places) == list(range(min(places), min(places) + 10))  # one contiguous range
            orders.add(tuple(place - min(places) for place in places))
    assert len(orders) == 4


def test_small_buffer_mixes_only_what_is_near(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER", 4)
    places = [sample.place for sample in open_shards(root)]
    assert sorted(places) == list(range(TOTAL))
    assert places != sorted(places)
    assert all(place < drawn + 5 for drawn, place in enumerate(places))


def test_buffer_is_filled_by_a_quarter_before_the_first_sample(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER", 16)
    assert {next(iter(open_shards(root, seed=seed))).place for seed in range(30)} == {0, 1, 2, 3}


def test_name_tells_shard_and_sample_of_a_place_in_the_current_epoch(root: Path) -> None:
    shards = open_shards(root)
    where = [f"{name}, sample {i}" for name, length in zip(NAMES, LENGTHS, strict=True) for i in range(length)]
    for epoch in range(3):
        for batch in load(shards, 1, 0, epoch=epoch):
            assert shards.name(int(batch.places)) == where[numbers([batch])[0]]


# ---- the middle of an epoch


@pytest.mark.parametrize(
    ("rank", "size", "workers", "buffer"), [(0, 1, 0, 3), (1, 2, 0, 5000), (0, 1, 2, 5000), (1, 2, 3, 3)]
)
def test_epoch_taken_up_in_its_middle_gives_the_rest_to_the_pixel(
    rank: int, size: int, workers: int, buffer: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUFFER", buffer)
    shards = open_shards(root, transform=augmented)
    whole = load(shards, 2, workers, epoch=1, rank=rank, size=size)
    assert len(whole) == TOTAL // (2 * size)
    for skip in range(len(whole) + 1):
        rest = load(open_shards(root, transform=augmented), 2, workers, epoch=1, rank=rank, size=size, skip=skip)
        assert len(rest) == len(whole) - skip
        for got, want in zip(rest, whole[skip:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got[:4], want[:4], strict=True)), skip


def test_skipped_batches_are_not_decoded(root: Path) -> None:
    seen: list[int] = []
    shards = open_shards(root, transform=lambda image: seen.append(1) or as_tensor(image))
    load(shards, 2, 0, skip=5)
    assert len(seen) == (TOTAL // 2 - 5) * 2


# ---- random numbers


def test_workers_do_not_alter_an_images_augmentation(root: Path) -> None:
    def images(workers: int, epoch: int = 0, seed: int = 0) -> dict[int, Tensor]:
        batches = load(open_shards(root, transform=augmented, seed=seed), 1, workers, epoch=epoch)
        return {int(batch.places): batch.images % 1 for batch in batches}  # the noise alone

    alone = images(0)
    for workers in (1, 3):
        others = images(workers)
        assert alone.keys() == others.keys()
        assert all(torch.equal(alone[place], others[place]) for place in alone)
    for changed in (images(0, epoch=1), images(0, seed=1)):
        assert not any(torch.equal(alone[place], changed[place]) for place in alone)
    assert len({image.numpy().tobytes() for image in alone.values()}) == TOTAL


@pytest.mark.parametrize("training", [True, False])
def test_reading_leaves_the_callers_random_numbers_alone(training: bool, root: Path) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()

    before = states()
    for _ in open_shards(root, training=training, transform=augmented):
        assert states() == before
    assert states() == before


def test_shards_may_be_sent_to_a_spawned_worker(root: Path) -> None:
    shards = open_shards(root)
    shards.plan(epoch=3, rank=1, size=2, batch=2)
    assert read(pickle.loads(pickle.dumps(shards))) == read(shards)


# ---- lengths


def test_lengths_are_counted_where_no_info_tells_them(root: Path) -> None:
    assert [shard.length for shard in open_shards(root).shards] == list(LENGTHS)
    assert len(open_shards(root)) == TOTAL


@pytest.mark.parametrize(
    ("split", "lengths"), [("train", LENGTHS), (BRACES, LENGTHS), ("train-{001..002}.tar", LENGTHS[1:])]
)
def test_lengths_stated_in_info_are_taken_uncounted(
    split: str, lengths: tuple[int, ...], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_info(root)
    monkeypatch.delattr(module, "_count")
    shards = open_shards(root, split)
    assert tuple(shard.length for shard in shards.shards) == lengths
    assert sorted(read(shards)) == list(range(TOTAL - sum(lengths), TOTAL))


def test_shard_that_info_does_not_list_is_counted(root: Path) -> None:
    write_info(root, LENGTHS[:2], filenames=NAMES[:2])
    assert sorted(read(open_shards(root))) == list(range(TOTAL))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("stated", "found"), [((5, 4, 9), "holds 3 samples, but"), ((5, 2, 9), "holds 3 samples or more, but")]
)
def test_shard_of_another_length_than_stated_is_refused(
    stated: tuple[int, ...], found: str, training: bool, root: Path
) -> None:
    write_info(root, stated)
    shards = open_shards(root, training=training)
    with refused(f"shard train-001.tar {found} _info.json says {stated[1]}; ", "correct"):
        read(shards)


def test_shard_that_changed_since_it_was_counted_is_refused(root: Path) -> None:
    shards = open_shards(root)
    pack(root / "train-001.tar", {"0": files_of(0)})
    with refused("shard train-001.tar holds 1 samples, but at the start it held 3"):
        read(shards)


def test_epoch_may_be_shorter_than_the_shards(root: Path) -> None:
    shards = open_shards(root, samples=10)
    assert len(shards) == 10
    epochs = [frozenset(numbers(load(shards, 2, 2, epoch=epoch))) for epoch in range(4)]
    assert {len(epoch) for epoch in epochs} == {10}
    assert len(set(epochs)) > 1
    assert read(open_shards(root, samples=10, training=False)) == list(range(10))


@pytest.mark.parametrize(("training", "knob"), [(True, "data.train_samples"), (False, "data.val_samples")])
def test_more_samples_than_the_shards_hold_are_refused(training: bool, knob: str, root: Path) -> None:
    assert len(open_shards(root, training=training, samples=TOTAL)) == TOTAL
    with refused(f"{knob}={TOTAL + 1}", f"hold {TOTAL}", "null"):
        open_shards(root, training=training, samples=TOTAL + 1)


def test_shards_without_a_sample_are_refused_and_one_among_others_is_not(root: Path) -> None:
    pack(root / "train-001.tar", {})
    assert sorted(read(open_shards(root))) == [*range(5), *range(8, TOTAL)]
    with refused("none of the 1 shards", "train-001.tar", "pack"):
        open_shards(root, "train-001.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_folders_and_meta_files_in_a_shard_are_no_samples(mode: str, root: Path) -> None:
    samples = {"__meta__/made": {"by": b"hand"}, "cat/1": files_of(1), "cat/0": files_of(0), "README": {"": b""}}
    with tarfile.open(root / "train-000.tar", mode) as tar:
        folder = tarfile.TarInfo("cat.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for key, files in samples.items():
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}".rstrip("."))  # README: no suffix, so no sample
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert read(open_shards(root, "train-000.tar", training=False)) == [1, 0]


def test_files_of_which_webdataset_makes_no_sample_are_counted(root: Path) -> None:
    with tarfile.open(root / "train-000.tar", "a") as tar:
        for name, kind in {"README": tarfile.REGTYPE, ".x.png": tarfile.REGTYPE, "link.png": tarfile.SYMTYPE}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.png" if kind == tarfile.SYMTYPE else ""
            tar.addfile(member)
    shards = open_shards(root)
    assert len(shards) == TOTAL
    assert shards.unread == {"hidden or no suffix": 2, "links": 1}
    assert open_shards(root, "train-001.tar").unread == {}


# ---- shards that cannot be read


def test_shards_that_were_joined_by_cat_are_refused_for_no_reader_sees_the_second(root: Path) -> None:
    first, second = (root / f"train-00{i}.tar" for i in range(2))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with refused("train-000.tar", "more behind its end mark"):
        open_shards(root)


def test_missing_shards_are_refused(root: Path) -> None:
    with refused("2 of 5 shards do not exist", "train-003.tar", str(root)):
        open_shards(root, "train-{000..004}.tar")


@pytest.mark.parametrize("content", [b"", b"no tar file" * 500], ids=["empty", "junk"])
def test_file_that_is_no_tar_is_refused(content: bytes, root: Path) -> None:
    (root / "train-001.tar").write_bytes(content)
    with refused("shard train-001.tar is no whole tar file", "fetch it again"):
        open_shards(root)
    write_info(root)
    with refused("shard train-001.tar is no whole tar file", "fetch it again"):
        read(open_shards(root))


SAMPLE = 2048  # bytes: a header and a block for each of its two files


@pytest.mark.parametrize("cut", [SAMPLE + 700, SAMPLE + 300, 2 * SAMPLE], ids=["data", "header", "between"])
def test_truncated_shard_is_refused(cut: int, root: Path) -> None:
    shard = root / "train-001.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    with refused("shard train-001.tar is no whole tar file", "fetch it again"):
        open_shards(root)
    write_info(root)
    with refused("shard train-001.tar", "fetch it again"):
        read(open_shards(root))


def test_shard_with_a_broken_header_is_refused(root: Path) -> None:
    shard = root / "train-001.tar"
    content = bytearray(shard.read_bytes())
    content[SAMPLE : SAMPLE + 512] = b"\xff" * 512
    shard.write_bytes(content)
    with refused("shard train-001.tar is no whole tar file", "fetch it again"):
        open_shards(root)
    write_info(root)
    with refused("shard train-001.tar holds 1 samples, but _info.json says 3"):
        read(open_shards(root))


def test_damage_found_in_a_worker_process_is_told(root: Path) -> None:
    (root / "train-001.tar").write_bytes(b"no tar file" * 500)
    write_info(root)
    with pytest.raises(ValueError, match=r"shard train-001\.tar is no whole tar file"):
        load(open_shards(root), 2, 2)


def test_remote_shards_need_stated_lengths(root: Path) -> None:
    reader = open_reader(root)
    reader.root = f"file://{root}"
    with refused(f"shard file://{root}/train-000.tar", "shard_lengths", "_info.json"):
        Shards(reader, as_tensor, training=True, seed=0)
    write_info(root)
    reader.info = open_reader(root).info
    assert sorted(read(Shards(reader, as_tensor, training=True, seed=0))) == list(range(TOTAL))


# ---- samples that are odd


def test_unreadable_image_is_flagged_and_not_dropped(root: Path) -> None:
    samples = {f"{i:04d}": files_of(i) for i in range(5)}
    samples["0003"]["png"] = b"\x89PNG and nothing more"
    pack(root / "train-000.tar", samples)
    for workers in (0, 2):
        (batch,) = load(open_shards(root, "train-000.tar"), 5, workers)
        assert set(numbers([batch])) == {0, 1, 2, 4}  # one of them twice
        (bad,) = batch.places[batch.faults == UNREADABLE].tolist()
        assert bad == 3
        batches = load(open_shards(root, "train-000.tar", training=False), 2, workers)
        assert sorted(numbers(batches)) == [0, 1, 2, 4]
        faults = {int(i): int(fault) for batch in batches for i, fault in zip(batch.places, batch.faults, strict=True)}
        assert faults == {0: 0, 1: 0, 2: 0, 3: UNREADABLE, 4: 0}


def test_unreadable_image_is_told_by_its_shard(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack(root / "train-001.tar", {"0": files_of(0), "1": files_of(1) | {"png": b""}})
    shards = open_shards(root, training=False)
    caplog.clear()  # timm warns that there is no _info.json
    for batch in load(shards, 4, 0):
        shards.tell(batch)
    [told] = caplog.messages
    assert told.startswith("unreadable image: train-001.tar, sample 1 (cannot identify image file")


def test_unreadable_image_keeps_its_class(root: Path) -> None:
    pack(root / "train-000.tar", {"0": {"jpg": b"", "cls": b"2"}})
    assert [sample[:4] for sample in open_shards(root, "train-000.tar")] == [(None, 2, 0, UNREADABLE)]


@pytest.mark.parametrize("upright", [False, True])
def test_exif_orientation_is_reported_and_followed_where_wanted(upright: bool, root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    jpg = io.BytesIO()
    Image.new("RGB", (8, 4)).save(jpg, "jpeg", exif=exif)
    pack(root / "train-000.tar", {"0": {"JPG": jpg.getvalue(), "cls": b"2"}})
    (sample,) = open_shards(root, "train-000.tar", upright=upright)
    assert sample.image is not None
    assert sample.image.shape == ((3, 8, 4) if upright else (3, 4, 8))
    assert FAULTS[sample.fault] == "EXIF-rotated"


@pytest.mark.parametrize("written", [None, b"", b"cat", b"-1", b"1.5"], ids=str)
def test_sample_without_a_class_is_refused(written: bytes | None, root: Path) -> None:
    samples = {"0000": files_of(0), "0001": {"png": picture(1)} | ({} if written is None else {"cls": written})}
    pack(root / "train-001.tar", samples)
    with refused("shard train-001.tar, sample 0001: no class in its .cls", "write a number"):
        read(open_shards(root))


def test_sample_without_an_image_is_refused(root: Path) -> None:
    pack(root / "train-001.tar", {"0000": {"bmp": picture(0), "cls": b"1"}})
    with refused("shard train-001.tar, sample 0000: no image", "(bmp, cls)", "jpg, png, webp"):
        read(open_shards(root))


def test_class_comes_from_the_json_field_that_info_names(root: Path) -> None:
    for name, begin in (("train-000.tar", 0), ("train-001.tar", 2)):
        pack(
            root / name, {str(i): files_of(i) | {"json": b'{"other": %d}' % (i + 7)} for i in range(begin, begin + 2)}
        )
    write_info(root, (2, 2), filenames=NAMES[:2], alt_label="other")
    assert [sample.target for sample in open_shards(root, "train", training=False)] == [7, 8, 9, 10]


@pytest.mark.parametrize("written", [None, b"{", b"{}", b'{"other": [1]}', b'{"other": -1}'], ids=str)
def test_sample_without_the_json_field_is_refused(written: bytes | None, root: Path) -> None:
    pack(root / "train-000.tar", {"0000": files_of(0) | ({} if written is None else {"json": written})})
    write_info(root, (1,), filenames=NAMES[:1], alt_label="other")
    with refused("shard train-000.tar, sample 0000: no class in its json field 'other'", "write a number"):
        read(open_shards(root, "train"))


def test_class_map_is_applied(root: Path) -> None:
    def classes(mapping: dict[int, int]) -> list[int]:
        shards = Shards(open_reader(root, class_map=mapping), as_tensor, training=False, seed=0)
        return [sample.target for sample in shards]

    assert classes({0: 9, 1: 8, 2: 7})[:4] == [9, 8, 7, 9]
    with refused("shard train-000.tar, sample 0002: no class", "KeyError: 2"):
        classes({0: 9, 1: 8})
