"""Turns, ratios and spreads, by a clock that the steps themselves move."""

from collections.abc import Callable

import pytest
import torch

from sgconvnext.profile import timing
from sgconvnext.profile.session import Session
from sgconvnext.profile.timing import Step, Timing

CPU = torch.device("cpu")


class Clock:
    """Time that passes only while a step runs; ``drift`` times as slowly with every turn of the clock's reading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pace, self.drift, self.ran = 0.0, 1.0, 1.0, ""
        monkeypatch.setattr(timing.time, "perf_counter", self.read)

    def read(self) -> float:
        self.pace *= self.drift
        return self.now

    def step(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds * self.pace
            self.ran += name

        return run


def interleave(steps: list[Step], rounds: int, seconds: float) -> list[Timing]:
    return Session(rounds, seconds).time("beads", steps, CPU)


def test_steps_take_turns_until_a_round_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    first, second = interleave([clock.step("a", 0.25), clock.step("b", 0.5)], rounds=3, seconds=1.0)
    assert clock.ran == "aaa" + "bbb" + 3 * 2 * "aab"
    assert first.rounds == [[0.25, 0.25]] * 3
    assert second.rounds == [[0.5, 0.5]] * 3


def test_short_steps_are_repeated_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    interleave([clock.step("a", 0.025), clock.step("b", 0.05)], rounds=2, seconds=0.3)
    assert clock.ran == "aaa" + "bbb" + 2 * 3 * "aaaabb"


def test_step_longer_than_a_round_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    interleave([clock.step("a", 5.0)], rounds=2, seconds=1.0)
    assert clock.ran == "aaa" + "aa"


def test_same_thing_twice_has_a_ratio_of_one_on_a_machine_that_slows_down(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.drift = 1.002
    first, second = interleave([clock.step("a", 0.25), clock.step("a", 0.25)], rounds=5, seconds=1.0)
    assert second.ratio == pytest.approx(1, abs=0.01)
    assert first.spread > 0.05


def test_slowed_copy_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    steps = [clock.step("a", 0.25), clock.step("b", 0.3)]
    assert interleave(steps, rounds=5, seconds=1.0)[1].ratio == pytest.approx(0.25 / 0.3)


def test_ratio_is_the_median_of_the_pairs_and_not_the_ratio_of_medians() -> None:
    measured = Timing([[2.0, 4.0], [9.0]], [[1.0, 4.0], [3.0]])
    assert measured.ratio == 0.5  # of 0.5, 1 and 1/3
    assert measured.by_round == [3.0, 9.0]
    assert measured.median == 6.0
    assert measured.spread == 1.0
