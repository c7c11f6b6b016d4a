"""ListOps (Nangia and Bowman 2018) as in Long Range Arena (Tay et al. 2021, section 2.2): nested operations on digits.

    [MAX 4 [MED 1 9 3 ] [SM 8 7 ] 0 ]  =  max(4, 3, 5, 0)  =  5

A sample is a sequence of such tokens in prefix notation, and its class is the value, 0 to 9. To find it, a model has
to combine tokens that stand a thousand places apart, in the order that the brackets give.

L is the length of a sequence in tokens: an operator and its closing bracket count as two, a digit as one.
"""

import os
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .streams import check_index, check_split, check_whole, stream

PAD, END = "<pad>", "]"
DIGITS = tuple("0123456789")
OPERATOR_SHARE = 0.25  # of the arguments above the deepest level, in the published data; the others are digits
SHORTEST = 4  # [MIN 0 0 ]
TRIES = 10_000  # of lengths, before an expression is given up; the default lengths need 3 of them on average
DEEPEST, MOST_ARGUMENTS, LONGEST = 100, 1000, 2**20
HEADER = "Source\tTarget"  # of Long Range Arena's files


def _middle(values: list[int]) -> int:
    """The median; of an even number of values, the mean of the two in the middle, rounded down."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": _middle,
    "[SM": lambda values: sum(values) % 10,
}
VOCABULARY = [PAD, *OPERATORS, END, *DIGITS]
_PLACE = {name: place for place, name in enumerate(VOCABULARY)}


class _Sequences(Dataset[tuple[Tensor, int]]):
    """What both datasets tell of their samples.

    Attributes:
        length: of a sample's tensor.
        vocabulary: the token of each number; 0 is the padding.
        class_to_idx: the classes, which are the values "0" to "9".
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.vocabulary = list(VOCABULARY)
        self.class_to_idx = {digit: number for number, digit in enumerate(DIGITS)}

    def _padded(self, numbers: Iterable[int]) -> Tensor:
        found = torch.tensor(list(numbers))
        return torch.nn.functional.pad(found, (0, self.length - len(found)))


class ListOps(_Sequences):
    """Expressions made on the spot: sample i depends on (seed, train, i) alone, and no two splits share a stream.

    Of 20,000 samples with the default arguments, the middle half is 699 to 1,302 tokens long (median 952). The classes
    are skewed, since MIN and MAX of many values are mostly 0 and 9: 9 and 0 have a share of 17 % each, the others
    have 7 to 9 % each. So a model that always answers 9 is right in 17 % of the cases; one that sees nothing but the
    first operator, and answers 0 to MIN, 9 to MAX and 4 to MED, in 36 %.

    Args:
        train: the training samples, or those held out.
        samples: how many.
        lengths: the least and the greatest L, both included; shorter ones are padded at the end with 0.
        depth: levels of the tree of arguments at most, the digits' own included, as in Long Range Arena's generator.
        arguments: of an operator, at most; each number from 2 on is equally likely.
        seed: of all samples.

    Raises:
        ValueError: an argument is out of range, or (almost) no expression has such a length.
    """

    def __init__(
        self,
        train: bool,
        samples: int,
        lengths: tuple[int, int] = (500, 2000),
        depth: int = 10,
        arguments: int = 10,
        seed: int = 0,
    ) -> None:
        check_split(train, samples, seed)
        _check_lengths(lengths, depth, arguments)
        super().__init__(lengths[1])
        self.train, self.samples, self.seed = train, samples, seed
        self.lengths, self.depth, self.arguments = lengths, depth, arguments
        self[0]  # lengths that are hardly ever met fail here

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The tokens' numbers (lengths[1],), int64, and the value of the expression."""
        check_index(index, self.samples)
        rng = stream(self.seed, self.train, index)
        tokens, target = expression(rng, self.lengths, self.depth, self.arguments)
        return self._padded(_PLACE[token] for token in tokens), target


def expression(
    rng: np.random.Generator, lengths: tuple[int, int] = (500, 2000), depth: int = 10, arguments: int = 10
) -> tuple[list[str], int]:
    """A random expression and its value.

    It begins with an operator. Each argument is an operator with probability 1/4, but on the deepest level always a
    digit; operators, digits and numbers of arguments are equally likely. Trees of other lengths are dropped.

    Args:
        rng: what is drawn from.
        lengths: the least and the greatest L, both included.
        depth: levels of the tree at most, the digits' own included.
        arguments: of an operator, at most.

    Returns:
        L tokens, and the value.

    Raises:
        ValueError: none of 10,000 trees has such a length.
    """
    for _ in range(TRIES):
        levels, length = _tree(rng, lengths[1], depth, arguments)
        if lengths[0] <= length <= lengths[1]:
            break
    else:
        raise ValueError(
            f"none of {TRIES} expressions with depth={depth} and arguments={arguments} has a length of {lengths[0]} "
            f"to {lengths[1]} tokens (lengths={lengths}); ask for a wider range, or for another depth"
        )
    operators = tuple(OPERATORS)
    nodes = []  # a level's nodes from left to right: number of arguments, and the token
    for counts in levels:
        chosen = rng.integers(4, size=len(counts)), rng.integers(10, size=len(counts))
        rows = zip(counts.tolist(), *(numbers.tolist() for numbers in chosen), strict=True)
        nodes.append(iter([(count, operators[i] if count else DIGITS[digit]) for count, i, digit in rows]))
    tokens: list[str] = []

    def write(level: int) -> int:
        count, token = next(nodes[level])
        tokens.append(token)
        if not count:
            return int(token)
        result = OPERATORS[token]([write(level + 1) for _ in range(count)])
        tokens.append(END)
        return result

    return tokens, write(0)


def value(tokens: list[str]) -> int:
    """The value of an expression, found from its tokens alone, from left to right with a stack.

    Raises:
        ValueError: the tokens are not one whole expression.
    """
    open_lists: list[list[Any]] = [[]]
    for place, token in enumerate(tokens):
        if token in OPERATORS:
            open_lists.append([token])
        elif token in DIGITS:
            open_lists[-1].append(int(token))
        elif token == END and len(open_lists) > 1 and len(open_lists[-1]) > 1:
            name, *values = open_lists.pop()
            results = {"[MIN": min(values), "[MAX": max(values), "[MED": int(median(values)), "[SM": sum(values) % 10}
            open_lists[-1].append(results[name])
        else:
            raise ValueError(f"token {place}, {token!r}, does not belong there")
    if len(open_lists) != 1 or len(open_lists[0]) != 1:
        raise ValueError(f"{len(tokens)} tokens are not one whole expression")
    return int(open_lists[0][0])


def _tree(rng: np.random.Generator, longest: int, depth: int, arguments: int) -> tuple[list[Any], int]:
    """Each level's numbers of arguments, 0 for a digit, and L; a tree longer than the longest stays unfinished."""
    counts = rng.integers(2, arguments + 1, size=1)
    levels, length = [counts], 2
    while (size := int(counts.sum())) and length <= longest:
        counts = rng.integers(2, arguments + 1, size=size) * (rng.random(size) < OPERATOR_SHARE)
        if len(levels) == depth - 1:
            counts = np.zeros_like(counts)
        levels.append(counts)
        length += size + int(np.count_nonzero(counts))
    return levels, length


def _check_lengths(lengths: Any, depth: Any, arguments: Any) -> None:
    check_whole("depth", depth, 1, DEEPEST)
    check_whole("arguments", arguments, 2, MOST_ARGUMENTS)
    if not isinstance(lengths, (tuple, list)) or len(lengths) != 2:
        raise ValueError(f"lengths={lengths!r} must be two whole numbers, the least and the greatest length")
    for length in lengths:
        check_whole("lengths", length, 1, LONGEST)
    if lengths[0] > lengths[1]:
        raise ValueError(f"lengths={lengths}: the least is greater than the greatest; swap them")
    if lengths[1] < SHORTEST:
        raise ValueError(f"lengths={lengths}: the shortest expression has {SHORTEST} tokens; ask for longer ones")
    longest = 1
    for _ in range(depth - 1):
        longest = min(2 + arguments * longest, LONGEST)
    if longest < lengths[0]:
        raise ValueError(
            f"lengths={lengths}: with depth={depth} and arguments={arguments} the longest expression has {longest} "
            "tokens; raise depth or arguments, or ask for shorter ones"
        )


class LraListOps(_Sequences):
    """A file of Long Range Arena's own ListOps: basic_train.tsv, basic_val.tsv or basic_test.tsv.

    Its first line is ``Source<tab>Target``, the others are like ``( ( ( [MAX 4 ) 3 ) ] )<tab>4``. The parentheses are
    dropped, for the brackets say the same.

    Args:
        path: of the file.
        length: that every sample is padded to, at the end with 0; the published samples have fewer than 2,000 tokens.

    Raises:
        ValueError: the file cannot be read, or a line is none of that form or has more tokens; with its number.
    """

    def __init__(self, path: str | os.PathLike[str], length: int = 2000) -> None:
        check_whole("length", length, 1, LONGEST)
        super().__init__(length)
        place = os.fspath(path)
        self.sources: list[bytes] = []  # a byte for each token
        self.targets: list[int] = []
        try:
            with open(place, encoding="utf-8", errors="replace") as file:
                if (first := next(file, "").strip()) != HEADER:
                    raise ValueError(f"{place}:1: {first[:60]!r} must be {HEADER!r}, as in Long Range Arena's files")
                for number, line in enumerate(file, start=2):
                    self._add(f"{place}:{number}", line.rstrip("\n"))
        except OSError as error:
            raise ValueError(
                f"{place}: cannot be read ({error.strerror}); name a file such as basic_train.tsv of lra_release"
            ) from error
        if not self.targets:
            raise ValueError(f"{place}: holds no sample after its first line; name a file such as basic_train.tsv")

    def _add(self, place: str, line: str) -> None:
        source, _, target = line.partition("\t")
        if target not in DIGITS:
            raise ValueError(f"{place}: the target {target[:60]!r} must be a digit, after a tab")
        tokens = [token for token in source.split() if token not in "()"]
        unknown = next((token for token in tokens if _PLACE.get(token, 0) == 0), None)
        if unknown is not None:
            raise ValueError(f"{place}: unknown token {unknown[:60]!r}; known are {' '.join(VOCABULARY[1:])}")
        if not 0 < len(tokens) <= self.length:
            raise ValueError(
                f"{place}: {len(tokens)} tokens, but a sample has 1 to length={self.length}; change length"
            )
        self.sources.append(bytes(_PLACE[token] for token in tokens))
        self.targets.append(int(target))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The tokens' numbers (length,), int64, and the target."""
        check_index(index, len(self))
        return self._padded(self.sources[index]), self.targets[index]
