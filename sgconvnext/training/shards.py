"""WebDataset's tar shards, cut into ranges of samples: each seen once an epoch, and taken up again in its middle."""

import hashlib
import json
import random
import re
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import accumulate, islice
from os.path import join
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data.readers.targets import get_field
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import DataError
from . import rng
from .image_folders import refuse_rest
from .images import Sample, TellsFaults, decode, unreadable

# A worker draws from so many undecoded samples. 5000 of ImageNet's, of 110 KB each, take 0.55 GB and come from four of
# its usual shards; decoded they would take five times as much.
BUFFER = 5000
META = re.compile(r"__[^/]*__($|/)")  # names of files that webdataset passes over


class Shard(NamedTuple):
    """One tar file."""

    name: str  # as the split lists it
    url: str
    length: int  # in samples
    source: str  # of the length, as a message names it


class Shards(TellsFaults, IterableDataset[Sample]):
    """The samples of an epoch one after another, cut into one contiguous range per rank and worker.

    In training the shards' order is drawn anew for every epoch, and each worker shuffles its range through a buffer of
    undecoded samples. A range is as many whole batches as the loader asks of that worker, so that every rank has
    ``len(self) // (size * batch)`` of them; what remains at the end of the epoch's order is left out. In evaluation
    the order is the split's, and each sample is read once, whatever the number of ranks and workers.

    Args:
        reader: timm's ``ReaderWds``, asked for what the user stated: files, lengths, keys and classes.
        transform: of an RGB image.
        training: shuffled whole batches; else each sample in order.
        seed: of the order and of every sample's random numbers.
        samples: length of an epoch; None for all that the shards hold.
        upright: turn images as their EXIF orientation says.

    Raises:
        ValueError: a shard is missing, is no whole tar file or has no known length; there are fewer samples than
            wanted, or none.
        DataError: while reading, a shard is damaged or not as long as stated, or a sample has no class or no image.
    """

    def __init__(
        self,
        reader: Any,
        transform: Callable[[Any], Tensor],
        *,
        training: bool,
        seed: int,
        samples: int | None = None,
        upright: bool = False,
    ) -> None:
        super().__init__()
        self.transform, self.training, self.seed, self.upright = transform, training, seed, upright
        self.input_key: str = reader.input_key
        self.target_key: str = reader.target_key or reader.split_info.alt_label  # "": the class is in a .cls file
        self.class_to_idx: dict[Any, int] | None = reader.class_to_idx if reader.remap_class else None
        self.unread: Counter[str] = Counter()  # files of which webdataset makes no sample, in shards that are counted
        self.shards = _shards(reader, self.unread)
        held = sum(shard.length for shard in self.shards)
        if held == 0:
            raise ValueError(
                f"none of the {len(self.shards)} shards from {self.shards[0].url} on holds a sample; pack images into "
                "them"
            )
        self.samples = held if samples is None else samples
        if self.samples > held:
            knob = "data.train_samples" if training else "data.val_samples"
            raise ValueError(f"{knob}={samples}, but the {len(self.shards)} shards hold {held}; null takes them all")
        self.plan(epoch=0, rank=0, size=1, batch=1)

    def __len__(self) -> int:
        return self.samples

    def plan(self, epoch: int, rank: int, size: int, batch: int, skip: int = 0) -> None:
        """What the next iteration reads; to be called before the loader starts its workers.

        Args:
            epoch: with the seed, it fixes the order and every augmentation.
            rank: of this process among ``size``.
            size: number of processes.
            batch: samples in a batch, in training the loader's batch_size.
            skip: batches of this rank that were already trained on, with the same number of workers.
        """
        assert skip == 0 or self.training, "an evaluation has no middle to start from"
        self.epoch, self.rank, self.size, self.batch, self.skip = epoch, rank, size, batch, skip
        self.order = list(self.shards)
        if self.training:
            _random("shards", self.seed, epoch).shuffle(self.order)
        self.begins = list(accumulate((shard.length for shard in self.order[:-1]), initial=0))

    def name(self, place: int) -> str:
        """Where a sample lies, by its place in the epoch's order: ``train-000003.tar, sample 17``, counted from 0."""
        number = bisect_right(self.begins, place) - 1
        return f"{self.order[number].name}, sample {place - self.begins[number]}"

    def digest(self) -> str:
        """SHA-256 of the shards' names and lengths."""
        told = repr((self.samples, [(shard.name, shard.length) for shard in self.shards]))
        return hashlib.sha256(told.encode()).hexdigest()

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for place, shard, raw in self._train(worker, workers) if self.training else self._evaluate(worker, workers):
            with rng.stream(self.seed, self.epoch, place):
                sample = self._decode(place, shard, raw)
            yield sample  # outside of the block, or the caller would draw from this stream

    def _train(self, worker: int, workers: int) -> Iterator[tuple[int, Shard, dict[str, Any]]]:
        """The rank's batches number role, role + workers, ...: a loader asks its workers in turn.

        After ``skip`` batches the loader asks another worker first. So each worker takes over the role, and with it
        the range, whose batches it will be asked for. Samples of skipped batches are drawn again, but not decoded.
        """
        batches = self.samples // (self.size * self.batch)
        role = (worker + self.skip) % workers
        whole, more = divmod(batches, workers)  # the first `more` workers have a batch more than the others
        first = self.rank * batches + role * whole + min(role, more)
        last = first + len(range(role, batches, workers))
        drawn = self._shuffled(role, self._range(first * self.batch, last * self.batch))
        return islice(drawn, len(range(role, self.skip, workers)) * self.batch, None)

    def _shuffled(self, role: int, samples: Iterator[Any]) -> Iterator[Any]:
        import webdataset as wds  # type: ignore[import-untyped]

        drawn = _random("samples", self.seed, self.epoch, self.rank, role)
        return wds.shuffle(BUFFER, initial=BUFFER // 4, rng=drawn)(samples)

    def _evaluate(self, worker: int, workers: int) -> Iterator[tuple[int, Shard, dict[str, Any]]]:
        part, parts = self.rank * workers + worker, self.size * workers
        return self._range(self.samples * part // parts, self.samples * (part + 1) // parts)

    def _range(self, start: int, stop: int) -> Iterator[tuple[int, Shard, dict[str, Any]]]:
        """Undecoded samples start to stop - 1 of the epoch's order, each with its place and shard."""
        for shard, begin in zip(self.order, self.begins, strict=True):
            first, last = max(start - begin, 0), min(stop - begin, shard.length)
            if first < last:
                for place, raw in enumerate(_read(shard, first, last), begin + first):
                    yield place, shard, raw

    def _decode(self, place: int, shard: Shard, raw: dict[str, Any]) -> Sample:
        target = self._target(shard, raw)
        file = next((raw[key] for key in self.input_key.split(";") if key in raw), None)
        if file is None:
            kinds = ", ".join(key for key in raw if not key.startswith("__"))
            raise DataError(
                f"shard {shard.name}, sample {raw['__key__']}: no image among its files ({kinds}); pack it with one "
                f"of the suffixes {self.input_key.replace(';', ', ')}"
            )
        try:
            image, fault = decode(Image.open(BytesIO(file)), self.upright)
        except Exception as error:  # Pillow raises a dozen types for damaged files
            return unreadable(target, place, error)
        return Sample(self.transform(image), target, place, fault)

    def _target(self, shard: Shard, raw: dict[str, Any]) -> int:
        """The class in the .cls file, or in the json's field; through the class map where there is one."""
        where = f"json field {self.target_key!r}" if self.target_key else ".cls"
        try:
            stated = int(get_field(json.loads(raw["json"]), self.target_key) if self.target_key else raw["cls"])
            target = stated if self.class_to_idx is None else self.class_to_idx[stated]
            if target < 0:
                raise ValueError(f"it is {target}")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"shard {shard.name}, sample {raw['__key__']}: no class in its {where} "
                f"({type(error).__name__}: {error}); write a number from 0 on into it"
            ) from error
        return target


def _random(*key: object) -> random.Random:
    return random.Random(repr(key))  # Python seeds with the SHA-512 of a string, the same in every process


def _shards(reader: Any, unread: Counter[str]) -> list[Shard]:
    """The split's shards with their lengths: from _info.json, or counted in local files that it does not list.

    Files in counted shards that are not read are added to ``unread``.
    """
    stated: dict[str, int] = {}
    for split in reader.info.get("splits", {}).values():  # by name: a split in braces may be a part of a listed one
        stated |= dict(zip(split.get("filenames", ()), split.get("shard_lengths", ()), strict=False))
    names = [(name, join(reader.root, name)) for name in reader.split_info.filenames]
    missing = [name for name, url in names if not _remote(url) and not Path(url).exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} shards do not exist, the first is {missing[0]} in {reader.root}; fetch "
            "them, or correct the split"
        )
    return [
        Shard(name, url, stated[name], "_info.json says")
        if name in stated
        else Shard(name, url, _count(name, url, unread), "at the start it held")
        for name, url in names
    ]


def _remote(url: str) -> bool:
    return "://" in url or url.startswith("pipe:")


def _count(name: str, url: str, unread: Counter[str]) -> int:
    """How many samples a local tar file holds, by webdataset's own grouping; only the headers are read."""
    from webdataset.tariterators import base_plus_ext, group_by_keys  # type: ignore[import-untyped]

    if _remote(url):
        raise ValueError(f"shard {url} is remote and of unknown length; list it with shard_lengths in its _info.json")
    try:
        with tarfile.open(url) as tar:
            files = [member for member in tar if not member.isdir() and not META.match(member.name)]
            names = [member.name for member in files if member.isreg()]
            count = sum(1 for _ in group_by_keys({"fname": file, "data": b"", "__url__": url} for file in names))
            unread += Counter(links=len(files) - len(names))
            unread += Counter({"hidden or no suffix": sum(base_plus_ext(file)[0] is None for file in names)})
            refuse_rest(tar)
            return count
    except Exception as error:  # tarfile, the file system, gzip, bzip2 and lzma have types of their own
        raise _broken(name, error) from error


def _read(shard: Shard, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Samples first to last - 1 of a shard, undecoded; the shard's length is checked where its end is reached."""
    found = 0
    for found, raw in enumerate(_read_whole(shard), start=1):
        if found > shard.length:
            raise _wrong_length(shard, f"{found} samples or more")
        if found > first:
            yield raw
        if found == last < shard.length:
            return
    if found < shard.length:
        raise _wrong_length(shard, f"{found} samples")


def _read_whole(shard: Shard) -> Iterator[dict[str, Any]]:
    import webdataset as wds

    try:
        yield from wds.tarfile_to_samples()([{"url": shard.url}])
    except Exception as error:  # tarfile, the file system and what fetches remote shards have types of their own
        raise _broken(shard.name, error) from error


def _wrong_length(shard: Shard, found: str) -> DataError:
    return DataError(
        f"shard {shard.name} holds {found}, but {shard.source} {shard.length}; fetch it again, or correct the length"
    )


def _broken(name: str, error: Exception) -> DataError:
    # webdataset appends streams and addresses to an exception's arguments, tarfile has line breaks in them
    reason = next((item for item in error.args if isinstance(item, str)), type(error).__name__)
    return DataError(f"shard {name} is no whole tar file ({' '.join(reason.split())}); fetch it again")
