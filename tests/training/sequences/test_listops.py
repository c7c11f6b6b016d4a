"""ListOps: what is made has the value that is told, is the same everywhere; odd arguments and files are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused

from sgconvnext.training.sequences.listops import VOCABULARY, ListOps, LraListOps, expression, value


def names(tokens: torch.Tensor) -> list[str]:
    return [VOCABULARY[number] for number in tokens.tolist() if number]


def deepest(tokens: list[str]) -> int:
    """Levels of the tree, the digits' own included."""
    steps = np.cumsum([1 if token[0] == "[" else -1 if token == "]" else 0 for token in tokens])
    return int(steps.max()) + 1


def most_arguments(tokens: list[str]) -> int:
    found, open_lists = 0, [0]
    for token in tokens:
        if token == "]":
            found = max(found, open_lists.pop())
        else:
            open_lists[-1] += 1
            if token[0] == "[":
                open_lists.append(0)
    return found


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("7", 7),
        ("[MAX 4 [MED 1 9 3 ] [SM 8 7 ] 0 ]", 5),
        ("[MIN 4 2 [MAX 1 3 ] ]", 2),
        ("[MED 1 2 ]", 1),  # 1.5, rounded down
        ("[MED 9 1 4 8 ]", 6),
        ("[SM 9 9 9 ]", 7),
    ],
)
def test_value_of_expressions_by_hand(text: str, result: int) -> None:
    assert value(text.split()) == result


@pytest.mark.parametrize("text", ["", "1 2", "[MIN 1", "[MIN ]", "]", "1 ]", "[FIRST 1 2 ]", "<pad>"])
def test_no_expression_has_no_value(text: str) -> None:
    with refused():
        value(text.split())


@pytest.mark.parametrize("options", [{}, {"lengths": (4, 60), "depth": 4, "arguments": 5}])
def test_target_is_the_value_and_limits_hold(options: dict[str, Any]) -> None:
    made = ListOps(True, 100, **options)
    for tokens, target in (made[i] for i in range(100)):
        found = names(tokens)
        assert tokens.shape == (made.length,)
        assert tokens.dtype == torch.int64
        assert made.lengths[0] <= len(found) <= made.lengths[1]
        assert not tokens[len(found) :].any()  # the padding lies at the end only
        assert value(found) == target
        assert deepest(found) <= made.depth
        assert most_arguments(found) <= made.arguments


def test_limits_are_reached() -> None:
    found = [names(tokens) for tokens, _ in map(ListOps(True, 60).__getitem__, range(60))]
    assert max(map(deepest, found)) == 10
    assert max(map(most_arguments, found)) == 10
    assert {token for tokens in found for token in tokens} == set(VOCABULARY[1:])


def test_classes_are_as_skewed_as_documented() -> None:
    made = ListOps(True, 1000)
    shares = np.bincount([made[i][1] for i in range(1000)], minlength=10) / 1000
    assert 0.13 < shares[9] < 0.21
    assert 0.13 < shares[0] < 0.21
    assert (shares[1:9] > 0.05).all()
    assert (shares[1:9] < 0.12).all()


def test_sample_depends_on_seed_split_and_index_alone() -> None:
    some, more = ListOps(True, 5, seed=3), ListOps(True, 50, seed=3)
    torch.rand(3)
    np.random.rand(3)
    for i in (4, 0, 2):
        assert torch.equal(some[i][0], more[i][0])
        assert some[i][1] == more[i][1]


def test_splits_seeds_and_samples_differ() -> None:
    made = [ListOps(train, 30, seed=seed) for train in (True, False) for seed in (0, 1, 2**31 - 1)]
    assert len({tuple(each[i][0].tolist()) for each in made for i in range(30)}) == 30 * len(made)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": "val"}, ["train='val'", "True"]),
        ({"samples": 0}, ["samples=0"]),
        ({"samples": 2.5}, ["samples=2.5"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"depth": 0}, ["depth=0"]),
        ({"depth": True}, ["depth=True"]),
        ({"arguments": 1}, ["arguments=1"]),
        ({"lengths": 500}, ["lengths=500", "two"]),
        ({"lengths": (500, "2000")}, ["lengths='2000'"]),
        ({"lengths": (600, 500)}, ["lengths=(600, 500)", "swap"]),
        ({"lengths": (1, 3)}, ["lengths=(1, 3)", "4 tokens"]),
        ({"depth": 1, "arguments": 2}, ["lengths=(500, 2000)", "depth=1", "arguments=2", "raise"]),
        ({"depth": 3, "lengths": (121, 122)}, ["lengths=(121, 122)", "depth=3", "arguments=10", "wider"]),
    ],
)
def test_odd_arguments_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with refused(*words):
        ListOps(**({"train": True, "samples": 4} | options))


def test_index_beyond_the_samples_ends_a_loop() -> None:
    assert len(list(ListOps(True, 3))) == 3


# ---- Long Range Arena's files


def nested(tokens: list[str]) -> str:
    """With the parentheses of the published files: each operator, argument and end joins what is before it."""
    stack: list[list[str]] = [[]]
    for token in tokens:
        if token[0] == "[":
            stack.append([token])
            continue
        if token == "]":
            done = stack.pop()
            token = f"( {done[0]} ] )"
        stack[-1] = [f"( {stack[-1][0]} {token} )"] if stack[-1] else [token]
    return stack[0][0]


def write(path: Path, *lines: str) -> str:
    path.write_text("\r\n".join(["Source\tTarget", *lines]) + "\r\n")
    return str(path)


def test_published_form_gives_the_same_tokens(tmp_path: Path) -> None:
    made = [expression(np.random.default_rng(i)) for i in range(5)]
    assert nested(["[MAX", "4", "3", "]"]) == "( ( ( [MAX 4 ) 3 ) ] )"
    read = LraListOps(write(tmp_path / "basic_val.tsv", *(f"{nested(tokens)}\t{target}" for tokens, target in made)))
    assert len(read) == 5
    for (tokens, target), (want, result) in zip((read[i] for i in range(5)), made, strict=True):
        assert tokens.shape == (2000,)
        assert tokens.dtype == torch.int64
        assert names(tokens) == want
        assert target == result


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("( ( ( [MAX 4 ) 3 ) ] ) 9", [":3:", "tab"]),
        ("( ( ( [MAX 4 ) 3 ) ] )\t10", [":3:", "'10'"]),
        ("( ( ( [MAX 4 ) x ) ] )\t4", [":3:", "'x'", "[MAX"]),
        ("( ( ( [MAX 4 ) <pad> ) ] )\t4", [":3:", "<pad>"]),
        ("[MAX 1 2 3 4 ]\t4", [":3:", "6 tokens", "length=5"]),
        ("\t4", [":3:", "0 tokens"]),
        ("", [":3:"]),
    ],
)
def test_odd_line_is_told_by_its_number(tmp_path: Path, line: str, words: list[str]) -> None:
    path = write(tmp_path / "basic_train.tsv", "[MAX 1 2 ]\t2", line)
    with refused(path, *words):
        LraListOps(path, length=5)


def test_odd_files_are_refused(tmp_path: Path) -> None:
    with refused("none.tsv", "cannot be read"):
        LraListOps(tmp_path / "none.tsv")
    with refused("cannot be read"):
        LraListOps(tmp_path)
    (tmp_path / "other.tsv").write_bytes(b"\xff\xfe")
    with refused("other.tsv:1", "Source"):
        LraListOps(tmp_path / "other.tsv")
    with refused("empty.tsv", "no sample"):
        LraListOps(write(tmp_path / "empty.tsv"))
    with refused("length=0"):
        LraListOps(tmp_path / "none.tsv", length=0)
