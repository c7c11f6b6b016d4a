"""Sequences by name: what data.dataset=sequence/NAME, data.root, the splits and data.kwargs mean."""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from ...errors import DataError, one_line
from ..config import Config, DataConfig
from ..images import Sample, TellsFaults, unreadable
from .listops import ListOps, LraListOps
from .pathfinder import LraPathfinder, Pathfinder
from .pixels import SOURCES, Pixels, open_pixels
from .speech import SC10, Speech
from .text import ByteText, WikiText

PREFIX = "sequence/"
SPLIT = ("lra_listops", "lra_pathfinder", "wikitext", "speech")  # into files or lists that have names
FURTHER = {  # arguments that an opener hands on as they are
    "listops": ("lengths", "depth", "arguments", "seed"),
    "pathfinder": ("size", "path_length", "distractors", "dash", "gap", "curvature", "seed"),
}
# by data.val_split's and data.train_split's usual values, what the published files call a split
WIKITEXT, SPEECH = {"val": "valid"}, {"val": "validation"}


class Sequences(TellsFaults, Dataset[Sample]):
    """A dataset of (tokens or a signal, class or tokens) as the loaders take it.

    Args:
        source: ``source[index]`` gives such a pair, or raises DataError where a file cannot be read.
        facts: what its samples depend on, beside its number of samples and classes.
    """

    noun = "sequence"

    def __init__(self, source: Any, facts: str) -> None:
        super().__init__()
        self.source, self.facts = source, facts
        self.epoch = 0  # the loader sets it; samples do not depend on it

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            tokens, target = self.source[index]
        except DataError as error:
            return unreadable(-1, index, error)
        return Sample(tokens, target, index, 0)

    def name(self, place: int) -> str:
        """The file of a sequence where it has one, else its number."""
        files = getattr(self.source, "files", None)
        return str(files[place]) if files else f"sequence {place}"

    def targets(self) -> list[int] | None:
        """Every sequence's class, where the dataset has a list of them."""
        return getattr(self.source, "targets", None)

    def digest(self) -> str:
        files = getattr(self.source, "files", None)
        text = getattr(self.source, "text", None)  # of a language model
        held = "" if text is None else hashlib.sha256(text.numpy().tobytes()).hexdigest()
        return hashlib.sha256(repr((len(self), self.facts, files, self.targets(), held)).encode()).hexdigest()


def open_sequences(config: Config, train: bool) -> tuple[Sequences, dict[str, int] | None, int | None]:
    """One split of the sequences that data.dataset names, its classes by name, or their number where they have none.

    Raises:
        ValueError: an unknown name or argument, or data that is not there; and knobs that only images have.
    """
    data = config.data
    name = data.dataset.removeprefix(PREFIX)
    if name not in OPENERS:
        raise ValueError(f"data.dataset={data.dataset!r} is unknown; use {PREFIX} and one of {', '.join(OPENERS)}")
    for key, value in (
        ("augment.mixup", config.augment.mixup),
        ("augment.cutmix", config.augment.cutmix),
        ("augment.auto_augment", config.augment.auto_augment),
        ("augment.reprob", config.augment.reprob),
        ("augment.color_jitter", config.augment.color_jitter),
        ("model.channels_last", config.model.channels_last),
        ("run.tune", config.run.tune),
    ):
        if value:
            raise ValueError(f"{key}={value} is for images; leave it out with data.dataset={data.dataset}")
    if name not in SPLIT and (data.train_split, data.val_split) != ("train", "val"):
        raise ValueError(f"data.val_split={data.val_split!r}: {data.dataset} has the splits train and val alone")
    opener = OPENERS[name]
    kwargs = {key: value for key, value in data.kwargs.items() if value is not None}  # null takes one back
    own = [key for key in inspect.signature(opener).parameters if key not in ("data", "train", "options")]
    known = [*own, *FURTHER.get(name, ())]
    if unknown := sorted(set(kwargs) - set(known)):
        takes = ", ".join(known)
        raise ValueError(f"data.kwargs has {unknown[0]!r}, which {data.dataset} does not take; it takes {takes}")
    try:
        source = opener(data, train, **kwargs)
        len(source)  # fails for lengths that are no whole numbers
    except (TypeError, AttributeError) as error:
        raise ValueError(f"data.kwargs={kwargs} cannot be what {data.dataset} takes: {one_line(error)}") from error
    classes = getattr(source, "class_to_idx", None)
    number = None if classes else getattr(source, "num_classes", getattr(source, "vocabulary", None))
    return Sequences(source, f"{name} {sorted(kwargs.items())}"), classes, number


def _split(data: DataConfig, train: bool, called: dict[str, str] | None = None) -> str:
    split = data.train_split if train else data.val_split
    return (called or {}).get(split, split)


def _samples(data: DataConfig, train: bool) -> int:
    """How many samples to make.

    Raises:
        ValueError: the knob says none.
    """
    knob = "train_samples" if train else "val_samples"
    samples: int | None = getattr(data, knob)
    if samples is None:
        raise ValueError(f"data.dataset={data.dataset} is made on the spot: set data.{knob}, how many to make")
    return samples


def _listops(data: DataConfig, train: bool, **options: Any) -> ListOps:
    return ListOps(train, _samples(data, train), **options)


def _lra_listops(data: DataConfig, train: bool, length: int = 2000) -> LraListOps:
    return LraListOps(f"{data.root}/basic_{_split(data, train)}.tsv", length)


def _pathfinder(data: DataConfig, train: bool, tokens: bool = True, **options: Any) -> Pixels:
    return Pixels(Pathfinder(train, _samples(data, train), **options), tokens)


def _lra_pathfinder(data: DataConfig, train: bool, tokens: bool = True) -> Pixels:
    return Pixels(LraPathfinder(data.root, _split(data, train)), tokens)


def _pixels(name: str) -> Callable[..., Pixels]:
    def opened(data: DataConfig, train: bool, tokens: bool = True) -> Pixels:
        return open_pixels(name, data.root, train, tokens)

    return opened


def _text(data: DataConfig, train: bool, length: int = 1024, separator: str = "") -> ByteText:
    return ByteText(data.root, train, length, separator.encode() or None)


def _wikitext(data: DataConfig, train: bool, length: int = 1024) -> WikiText:
    return WikiText(data.root, _split(data, train, WIKITEXT), length)


def _speech(data: DataConfig, train: bool, words: Any = SC10, rate: int = 16000) -> Speech:
    if (isinstance(words, str) and words != "all") or not all(isinstance(word, str) for word in words):
        raise ValueError(f"data.kwargs.words={words!r} must be all, or a list of words ('yes' and 'no' in quotes)")
    return Speech(data.root, _split(data, train, SPEECH), None if words == "all" else words, rate)


# Their arguments after the first two are those of data.kwargs.
OPENERS: dict[str, Callable[..., Any]] = {
    "listops": _listops,
    "lra_listops": _lra_listops,
    "pathfinder": _pathfinder,
    "lra_pathfinder": _lra_pathfinder,
    **{name: _pixels(name) for name in SOURCES},
    "text": _text,
    "wikitext": _wikitext,
    "speech": _speech,
}
