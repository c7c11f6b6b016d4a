"""Bytes of text: windows, which document is for what, WikiText's articles and words, and what is refused."""

import gzip
import math
import random
from pathlib import Path

import pytest
import torch
from helpers import refused

from sgconvnext.training.sequences.text import ByteText, WikiText, Windows

WIKI = """ \n = Robert <unk> = \n \n Robert is an actor . He had a part in 2000 .
 \n = = Career = = \n \n In 2002 , he was seen again .\n \n = A = \n \n The letter = of all letters .\n"""


def documents_of(dataset: Windows) -> list[bytes]:
    return bytes(dataset.text.numpy()).split(b"\0")[1:]


def write(root: Path, number: int, seed: int = 0) -> dict[str, bytes]:
    """Documents of 50 to 150 letters in files of each kind, in folders."""
    generator = random.Random(seed)
    written = {}
    for i in range(number):
        content = "".join(generator.choices("abcdefgh \n", k=generator.randint(50, 150))).encode()
        path = root / f"part{i % 3}" / f"{i:03d}{('.txt', '.md', '.txt.gz')[i % 3]}"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        written[str(path)] = content
    return written


def test_windows_cover_the_text_once_and_targets_are_the_next_bytes() -> None:
    text = Windows([b"abc", b"defgh"], 3, "it")  # \0abc\0defgh
    assert [(bytes(x.tolist()), bytes(y.tolist())) for x, y in (text[i] for i in range(len(text)))] == [
        (b"\0ab", b"abc"),
        (b"c\0d", b"\0de"),
        (b"efg", b"fgh"),
    ]
    assert {part.dtype for part in text[0]} == {torch.int64}


def test_only_what_fills_no_window_is_left_out() -> None:
    text = Windows([bytes(range(1, 101))], 33, "it")
    assert torch.cat([targets for _, targets in text]).tolist() == list(range(1, 100))
    for index in (3, -1):
        with pytest.raises(IndexError):
            text[index]


def test_every_byte_value_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 20)  # which is no UTF-8
    (tmp_path / "b.txt").write_bytes(b"short")
    assert bytes(ByteText(str(tmp_path), True, 8).text.numpy()) == b"\0" + bytes(range(256)) * 20


def test_each_document_is_in_one_split(tmp_path: Path) -> None:
    written = write(tmp_path, 60)
    train, val = (documents_of(ByteText(str(tmp_path), train, 8)) for train in (True, False))
    assert sorted(train + val) == sorted(written.values())
    total, held_out = sum(map(len, written.values())), sum(map(len, val))
    assert 0.09 * total < held_out <= 0.1 * total


def test_documents_keep_the_order_of_their_files(tmp_path: Path) -> None:
    written = write(tmp_path, 30)
    train = documents_of(ByteText(str(tmp_path), True, 8))
    assert train == [content for _, content in sorted(written.items()) if content in train]


def test_the_split_depends_on_contents_alone(tmp_path: Path) -> None:
    written = write(tmp_path / "a", 40)
    (tmp_path / "b").mkdir()
    for i, content in enumerate(reversed(written.values())):
        (tmp_path / "b" / f"{i}.txt").write_bytes(content)
    one, other = (set(documents_of(ByteText(str(tmp_path / name), False, 8))) for name in "ab")
    assert one == other


def test_a_repeated_document_is_read_once(tmp_path: Path) -> None:
    written = write(tmp_path, 20)
    for i in range(20):
        (tmp_path / f"copy{i}.txt").write_bytes(written[min(written)])
    train, val = (documents_of(ByteText(str(tmp_path), train, 8)) for train in (True, False))
    assert sorted(train + val) == sorted(written.values())


def test_the_shortest_document_is_held_out_where_none_fits(tmp_path: Path) -> None:
    for name, content in {"a": b"a" * 50, "b": b"b" * 40, "c": b"c" * 60}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    assert documents_of(ByteText(str(tmp_path), False, 8)) == [b"b" * 40]
    assert documents_of(ByteText(str(tmp_path), True, 8)) == [b"a" * 50, b"c" * 60]


def test_a_file_is_cut_at_the_separator(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"\f".join([b"one" * 20, b" \n", b"two" * 30, b"three" * 20]))
    with refused(str(tmp_path), "1 documents", "separator"):
        ByteText(str(tmp_path), True, 8)
    assert documents_of(ByteText(str(tmp_path), True, 8, separator=b"\f")) == [b"two" * 30, b"three" * 20]
    assert documents_of(ByteText(str(tmp_path), False, 8, separator=b"\f")) == [b"one" * 20]


def test_folders_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with refused("nowhere", "is no folder"):
        ByteText("nowhere", True, 8)
    (tmp_path / "picture.png").write_bytes(b"text")
    with refused(str(tmp_path), ".txt, .md, .gz"):
        ByteText(str(tmp_path), True, 8)
    (tmp_path / "blank.txt").write_bytes(b" \n")
    with refused(str(tmp_path), "0 documents"):
        ByteText(str(tmp_path), True, 8)


ZIPPED = gzip.compress(b"text" * 99, mtime=0)


DAMAGED = {"empty": b"", "no gzip": b"no gzip", "cut off": ZIPPED[:-9], "overwritten": ZIPPED[:10] + b"\xff" * 20}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, 5)
    (tmp_path / "bad.gz").write_bytes(content)
    with refused("bad.gz", "cannot be read"):
        ByteText(str(tmp_path), True, 8)


def test_lengths_that_leave_no_window_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 20)
    with refused("validation", str(tmp_path), "length=5000"):
        ByteText(str(tmp_path), False, 5000)
    with refused("length=0"):
        ByteText(str(tmp_path), False, 0)


def test_wikitext_is_cut_at_titles_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "wiki.valid.tokens").write_text(WIKI)
    text = WikiText(str(tmp_path), "valid", 16)
    first, second = documents_of(text)
    assert (first + second).decode() == WIKI
    assert b"= = Career = =" in first
    assert second.startswith(b" = A = \n")


def test_word_perplexity_counts_wikitexts_tokens(tmp_path: Path) -> None:
    """At one bit per byte the perplexity is 2 to the number of bytes per word, and every line has its <eos>."""
    (tmp_path / "wiki.test.tokens").write_text(WIKI)
    text = WikiText(str(tmp_path), "test", 16)
    tokens = [token for line in WIKI.splitlines() for token in [*line.split(), "<eos>"]]
    targets = len(WIKI) + 1  # with the 0 between the two articles
    assert math.isclose(text.bytes_per_word, targets / len(tokens))


def test_what_is_no_wikitext_is_refused(tmp_path: Path) -> None:
    with refused("wiki.train.tokens"):
        WikiText(str(tmp_path), "train", 8)
    (tmp_path / "wiki.train.tokens").write_text("A text\n = = Section = = \n")
    with refused("wiki.train.tokens", "= Title ="):
        WikiText(str(tmp_path), "train", 8)
    with refused("'validation'", "train, valid, test"):
        WikiText(str(tmp_path), "validation", 8)
