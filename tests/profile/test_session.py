"""A session ends by the clock or by Ctrl-C, keeps what it has, and says what it lacks and what failed."""

from collections.abc import Callable

import pytest
import torch

from sgconvnext.profile import session, timing
from sgconvnext.profile.session import DoesNotFitError, Session

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that only the measurements move."""
    now = [0.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def stepping(clock: list[float], seconds: float = 1.0, interrupted_at: float = float("inf")) -> Callable[[], None]:
    def step() -> None:
        clock[0] += seconds
        if clock[0] >= interrupted_at:
            raise KeyboardInterrupt

    return step


def interrupted() -> None:
    raise KeyboardInterrupt


def test_nothing_is_begun_after_the_time_is_up(clock: list[float]) -> None:
    own, done = Session(1, 1.0, seconds=25), []
    for name in "abcd":
        own.attempt(name, lambda name=name: done.append(name) or stepping(clock, 10)())  # type: ignore[misc]
    own.attempt("what is ready", lambda: done.append("ready"), begun=True)
    assert done == ["a", "b", "c", "ready"]  # c began in time
    assert own.notes() == ["Not measured before the 25 seconds of --seconds were over: d."]
    assert not own.failed


def test_nothing_at_all_is_begun_after_ctrl_c() -> None:
    own, done = Session(1, 1.0), []
    own.attempt("a", lambda: done.append("a"))
    own.attempt("b", interrupted)
    own.attempt("c", lambda: done.append("c"))
    own.attempt("d", lambda: done.append("d"), begun=True)
    own.attempt("e", lambda: own.time("e", [lambda: None], CPU), begun=True)
    assert done == ["a"]
    assert own.interrupted
    assert own.notes() == ["Not measured before Ctrl-C: b; c; d; e."]


def test_complete_rounds_are_kept_when_the_time_is_up(clock: list[float]) -> None:
    own = Session(5, 1.0, seconds=8.0)
    [measured] = own.time("beads", [stepping(clock)], CPU)  # 3 s of warm-up
    assert measured.rounds == [[1.0]] * 5
    assert own.notes() == []
    own = Session(5, 1.0, seconds=5.5)
    [measured] = own.time("beads", [stepping(clock)], CPU)
    assert measured.rounds == [[1.0]] * 3
    assert own.notes() == ["Not measured before the 5.5 seconds of --seconds were over: 2 of 5 rounds of beads."]


def test_complete_rounds_are_kept_at_ctrl_c(clock: list[float]) -> None:
    own = Session(5, 1.0)
    first, second = own.time("beads", [stepping(clock), stepping(clock, interrupted_at=12)], CPU)
    assert (first.rounds, second.rounds) == ([[1.0]] * 2, [[1.0]] * 2)
    assert own.notes() == ["Not measured before Ctrl-C: 3 of 5 rounds of beads."]
    with pytest.raises(KeyboardInterrupt):  # without one complete round there is nothing to keep
        Session(5, 1.0).time("beads", [interrupted], CPU)


def test_failure_is_noted_and_the_next_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    def failing(error: Exception) -> Callable[[], None]:
        def fail() -> None:
            raise error

        return fail

    own, done = Session(1, 1.0), []
    own.attempt("a", failing(torch.OutOfMemoryError("CUDA out of memory")))
    own.attempt("b", failing(DoesNotFitError("b: its process was killed")))
    assert not own.failed
    own.attempt("c", failing(ValueError("c: too small")))
    assert own.failed
    assert not caplog.records
    own.attempt("d", failing(RuntimeError("CUDA error:\n  misaligned address")))
    own.attempt("e", lambda: done.append("e"))
    assert done == ["e"]
    assert own.notes() == [
        "a: out of memory; not timed.",
        "b: out of memory; not timed.",
        "c: too small",
        "d failed: CUDA error: misaligned address",
    ]
    assert "Traceback" in caplog.text  # of what nobody expected
