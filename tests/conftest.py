"""What every test starts from."""

import functools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distributions, requires
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it while timm imports it, so before the next line

from huggingface_hub import constants
from training_helpers import only_line

from sgconvnext import tuning
from sgconvnext.profile import flops, race, timing

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have us, and the runs that we start, ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell, of what it starts behind its back
torch.set_num_threads(1)  # the tensors are tiny: on a busy machine threads would mostly wait for each other


@pytest.hookimpl(tryfirst=True)  # before the option -m chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "end_to_end" in item.path.parts:
            item.add_marker("end_to_end")


@functools.cache
def missing_libraries() -> list[str]:
    """Of the extra `integrations`, those that are not installed."""
    lines = [line for line in requires("sgconvnext") or [] if 'extra == "integrations"' in line]
    names = [re.split(r"[^\w.-]", line)[0] for line in lines]
    return [name for name in names if not any(distributions(name=name))]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("integrations") and missing_libraries():
        missing = ", ".join(missing_libraries())
        pytest.skip(f"{missing} is not installed: pip install -e '.[test,integrations]'")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is measured before and after the test, and what it measures takes no time."""
    monkeypatch.setattr(timing, "TURN_S", 1e-4)
    monkeypatch.setattr(race, "ROUND_S", 1e-4)
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the clock of `sgconvnext.tune` say that something is the fastest; all that it times still runs."""

    def says(fastest: str) -> None:
        def times(steps: dict[str, Any], *_: Any) -> tuple[dict[str, float], dict[str, str]]:
            for step in steps.values():
                step()
            return {name: 1.0 if name == fastest else 2.0 for name in steps}, {}

        monkeypatch.setattr(race, "times", times)

    return says


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the Hugging Face hub's client, which finds nothing else."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model cards without MACs, which take seconds to count."""

    def refuse(*_: Any) -> None:
        raise flops.UncountedError

    monkeypatch.setattr(flops, "count", refuse)


@pytest.fixture
def quiet() -> Iterator[None]:
    """The scripts set up logging for themselves; take it away again."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, quiet: None) -> Callable[..., None]:
    """train.py or validate.py in this process: seconds faster than another one."""

    def run(script: Any, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.main()

    return run


@pytest.fixture
def refusal(run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which a script ends, exit code 2."""

    def told(script: Any, *arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_here(script, *arguments)
        assert stopped.value.code == 2
        return only_line(script.__name__, capsys.readouterr().err)

    return told
