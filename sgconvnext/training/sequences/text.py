"""Text as bytes, for language models: any folder of documents, and WikiText-103.

Debian's packages hold some ten megabytes of English each in a folder that ByteText can read as it is:

    apt-get install anarchism  # a book of questions and answers, GPL-2: 11.7 MB of prose in 143 documents
    ByteText("/usr/share/doc/anarchism/markdown", train=True, length=4096)

    apt-get install python3.11-doc  # its manual, PSF licence: 11.0 MB of prose and code in 497 documents
    ByteText("/usr/share/doc/python3.11/html/_sources", train=True, length=4096)
"""

import hashlib
import itertools
import re
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import shortened
from .unzipped import read_unzipped

SUFFIXES = (".txt", ".md", ".gz")
SHARE = 10  # one of so many bytes is for validation
TITLE = re.compile(rb"^ = [^=\n][^\n]* = ?$", re.MULTILINE)  # that of a section is ` = = Title = = `
WIKI_FILES = {"train": "wiki.train.tokens", "valid": "wiki.valid.tokens", "test": "wiki.test.tokens"}


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Documents as one text of bytes, a 0 before each, in windows that follow on one another.

        inputs[i] = text[i * length : (i + 1) * length]
        targets[i] = text[i * length + 1 : (i + 1) * length + 1]

    So every byte but the first 0 is a target once. Only the last, fewer than ``length``, are left out.
    An item is (inputs, targets): int64 (length,) each, from 0 to 255.

    Args:
        documents: at least one, none blank.
        length: of a window.
        name: of the text, in messages.

    Raises:
        ValueError: the text is shorter than a window, or length is no positive number.
    """

    vocabulary: ClassVar[int] = 256

    def __init__(self, documents: list[bytes], length: int, name: str) -> None:
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        text = bytearray().join(itertools.chain.from_iterable((b"\0", document) for document in documents))
        if len(text) <= length:
            raise ValueError(f"{name} holds {len(text) - 1} bytes, which is too short for length={length}")
        self.length, self.text = length, torch.frombuffer(text, dtype=torch.uint8)
        ends = list(itertools.accumulate(len(document) + 1 for document in documents))
        self.places = [(end - len(document), end) for document, end in zip(documents, ends, strict=True)]

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} windows, but none has the index {index}")
        begin = index * self.length
        window = self.text[begin : begin + self.length + 1].long()
        return window[:-1], window[1:]

    @cached_property
    def bytes_per_word(self) -> float:
        """Targets of the whole text per word: perplexity per word = 2 ** (bits per byte * bytes_per_word).

        Words are what white space divides, and the end of each line is one: WikiText's <eos>, which its published
        perplexities count.
        """
        documents = (self.text[begin:end].numpy().tobytes() for begin, end in self.places)
        words = sum(len(document.split()) + document.count(b"\n") for document in documents)
        return (len(self.text) - 1) / words


class ByteText(Windows):
    """All text files below a folder, a tenth of their bytes held out for validation, by document.

    Each file is a document, or with ``separator`` each part of one. Blank documents are left out, and of those that
    are alike to the byte all but the first. The documents keep the order of the files' names; which of them are for
    validation depends only on what they contain: in the order of their SHA-256 each joins that still fits in the
    tenth, or the shortest where none does.

    Args:
        root: folder of .txt, .md and .gz files, however deep.
        train: the documents for training; else those for validation.
        length: of a window; see Windows.
        separator: bytes between two documents of a file, left out of both, such as a form feed: b"\\f".

    Raises:
        ValueError: the folder is missing or holds no text, or a single document, or less than a window; a .gz file
            is damaged.
    """

    def __init__(self, root: str, train: bool, length: int, separator: bytes | None = None) -> None:
        contents = map(read_unzipped, _text_files(root))
        parts = itertools.chain.from_iterable(
            content.split(separator) if separator else [content] for content in contents
        )
        documents = list(dict.fromkeys(part for part in parts if part.strip()))
        if len(documents) < 2:
            raise ValueError(
                f"{root!r} holds {len(documents)} documents, and training and validation need one each; "
                "divide the text into several files, or name the bytes between two documents as separator"
            )
        held_out = _held_out(documents)
        chosen = [document for document in documents if (document in held_out) != train]
        super().__init__(chosen, length, f"the {'training' if train else 'validation'} part of {root!r}")


class WikiText(Windows):
    """A split of WikiText-103 or WikiText-2 (arXiv 1609.07843) with a document per article.

    Args:
        root: folder of wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens.
        split: "train", "valid" or "test".
        length: of a window; see Windows.

    Raises:
        ValueError: there is no such split, its file is missing, or it has no line ` = Title = `.
    """

    def __init__(self, root: str, split: str, length: int) -> None:
        if split not in WIKI_FILES:
            raise ValueError(f"split={split!r} is none of WikiText's; use {', '.join(WIKI_FILES)}")
        path = Path(root, WIKI_FILES[split])
        content = read_unzipped(path)
        begins = [match.start() for match in TITLE.finditer(content)]
        if not begins:
            raise ValueError(f"{path} has no line ' = Title = ' and so is no file of WikiText's")
        bounds = [0, *begins[1:], len(content)]  # a blank line stands before the first title
        super().__init__([content[begin:end] for begin, end in itertools.pairwise(bounds)], length, str(path))


def _text_files(root: str) -> list[Path]:
    if not Path(root).is_dir():
        raise ValueError(f"{root!r} is no folder; name the one that holds the text")
    files = sorted(path for path in Path(root).rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{root!r} holds no {shortened(SUFFIXES)} file")
    return files


def _held_out(documents: list[bytes]) -> set[bytes]:
    """Those for validation of two documents or more, none alike."""
    room = sum(map(len, documents)) // SHARE
    chosen = set()
    for document in sorted(documents, key=lambda document: hashlib.sha256(document).digest()):
        if len(document) <= room:
            chosen.add(document)
            room -= len(document)
    return chosen or {min(documents, key=lambda document: (len(document), document))}
