"""A run that is killed at random moments, by signals that can and cannot be caught, ends as if it never had been."""

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kills import Killed, restart, straight, survive

from sgconvnext.training.run_folder import RunFolder

Unkilled = Callable[[int], str]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(scope="session")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """By the number of processes, the fingerprint of the run that nobody kills."""
    return functools.cache(lambda processes: straight(tmp_path_factory.mktemp("straight") / "run", processes))


def test_run_survives_twelve_kills_at_random_moments(unkilled: Unkilled, tmp_path: Path) -> None:
    done = survive(tmp_path, kills=12, processes=0, seed=4, want=unkilled(0))
    assert len(done) == 12
    for name in ("SIGTERM", "SIGINT", "SIGKILL"):
        assert sum(line.startswith(name) for line in done) >= 2, done
    assert sum("after -" not in line for line in done) >= 6, done  # the others came before the first update


@pytest.mark.parametrize("disk", ["links:1", "links:2"], ids=["hard links", "copies"])
def test_run_on_a_disk_without_symbolic_links_survives_kills(disk: str, unkilled: Unkilled, tmp_path: Path) -> None:
    script = ("tests/end_to_end/inject.py", disk)
    assert len(survive(tmp_path, kills=2, processes=0, seed=7, want=unkilled(0), script=script)) == 2
    for out in tmp_path.glob("killed-*/out"):
        assert not (out / "best.pth").is_symlink()
        assert RunFolder(out).behind("best.pth") in RunFolder(out).files()
        assert not list(out.glob("*.partial"))


def test_run_of_two_processes_survives_two_kills_of_torchrun(unkilled: Unkilled, tmp_path: Path) -> None:
    assert len(survive(tmp_path, kills=2, processes=2, seed=1, want=unkilled(2))) == 2


def test_processes_stop_when_torchrun_is_killed(tmp_path: Path) -> None:
    run = Killed(tmp_path, 2)
    assert not run.kill(signal.SIGKILL, 0.5)  # and then no process is left
    assert "SIGTERM: stopped after" in (tmp_path / "0.log").read_text()


def test_torchrun_restarts_a_run_whose_processes_are_killed_twice(unkilled: Unkilled, tmp_path: Path) -> None:
    log = restart(tmp_path, kills=2, seed=2, want=unkilled(2))
    assert log.count("disk: ") == 3  # it started once, and twice again
    assert "best top-1" in log
