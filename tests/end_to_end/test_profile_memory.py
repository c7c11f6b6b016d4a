"""What profile measures in processes of their own: the memory of a model, and what does not fit into it."""

import csv
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import refused
from training_helpers import ROOT, environment

from sgconvnext.profile import memory, signals
from sgconvnext.profile.session import DoesNotFitError
from sgconvnext.profile.signals import Signals
from sgconvnext.profile.workload import Workload, peak_memory

TINY = "sgconvnext_atto,depths=[1,1,1,1],dims=[8,16,24,32],num_classes=10"
BRIEF = ["--rounds", "2", "--round-seconds", "0.001"]


def test_memory_grows_with_the_batch_and_leaves_the_libraries_out() -> None:
    small, large = (peak_memory(TINY, Workload("training", batch, (64, 64))) for batch in (1, 128))
    images = 128 * 3 * 64 * 64 * 4
    assert 0 <= small < 2**28  # torch alone is more
    assert large - small > 3 * images


def test_what_does_not_fit_and_what_cannot_run_are_told_apart() -> None:
    with pytest.raises(DoesNotFitError, match=r"inference, 224 px, batch 100000000: out of memory"):
        peak_memory(TINY, Workload(batch=10**8))
    with refused("convnext_atto, inference, 8 px, batch 1: ", "Kernel size"):
        peak_memory("convnext_atto", Workload(img_size=(8, 8)))


def test_memory_of_a_signal_is_at_least_its_own() -> None:
    work = Signals(2**17, channels=64)
    assert memory.peak("SGConv", "cpu", functools.partial(signals.prepare, "SGConv", work)) > 2 * 64 * 2**17 * 4


def test_command_measures_memory_in_processes_of_their_own(tmp_path: Path) -> None:
    line = f"-m sgconvnext.profile throughput {TINY} --img-size 32 --csv --plot {tmp_path / 'a.png'}"
    done = subprocess.run(
        [sys.executable, *line.split(), *BRIEF],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"inference, 32 px, batch 1 of {TINY}\n"
    [row] = csv.DictReader(text for text in done.stdout.splitlines() if text and not text.startswith("#"))
    assert 0 <= float(row["peak GiB"]) < 0.5
    assert float(row["GMACs"]) > 0
    assert (tmp_path / "a.png").exists()
