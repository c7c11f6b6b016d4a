"""Signals: the first asks the run to stop, its echo changes nothing, a later one ends the process at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import alone, micro_config

from sgconvnext.training import data, signals
from sgconvnext.training.images import Images
from sgconvnext.training.signals import STOPPING, StopRequest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time.monotonic says, to be moved by the test."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("first", STOPPING)
@pytest.mark.parametrize("second", STOPPING)
def test_first_signal_is_remembered_and_its_echo_ignored(first: int, second: int, clock: list[float]) -> None:
    with StopRequest() as stop:
        assert (stop.received, stop.agreed) == (0, 0)
        os.kill(os.getpid(), first)
        assert stop.received == first
        assert signal.Signals(stop.received).name == signal.Signals(first).name
        clock[0] += signals.ECHO_S
        os.kill(os.getpid(), second)
        assert stop.received == first
    assert stop.agreed == 0  # that takes all processes


def test_exit_code_and_name_are_those_of_the_signal_that_was_agreed_on() -> None:
    stop = StopRequest()
    stop.received, stop.agreed = signal.SIGINT, signal.SIGTERM
    assert (stop.exit_code, stop.name) == (143, "SIGTERM")
    stop.agreed = signal.SIGINT
    assert (stop.exit_code, stop.name) == (130, "SIGINT")


def test_earlier_handlers_come_back_however_the_block_ends() -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    with StopRequest():
        assert all(signal.getsignal(number) not in before for number in STOPPING)
    assert [signal.getsignal(number) for number in STOPPING] == before
    with pytest.raises(RuntimeError, match="disk"), StopRequest():
        raise RuntimeError("disk")
    assert [signal.getsignal(number) for number in STOPPING] == before


SCRIPT = """
import multiprocessing, runpy, sys, time
signals = runpy.run_path(sys.argv[1])

def work():
    signals["settle_worker"](0)
    print("ready", flush=True)
    time.sleep(60)

with signals["StopRequest"]() as stop:
    multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
    while not stop.received:
        time.sleep(0.02)
    print(stop.received, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("second", STOPPING)
def test_second_signal_ends_the_process_and_its_workers_at_once(second: int) -> None:
    path = str(Path(signals.__file__))
    with subprocess.Popen([sys.executable, "-c", SCRIPT, path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "15\n"
            process.send_signal(signal.SIGTERM)  # the echo
            time.sleep(signals.ECHO_S + 0.2)
            assert process.poll() is None
            process.send_signal(second)
            process.communicate(timeout=10)  # ends only when the worker, too, has let go of the pipe
            assert process.returncode == -second
        finally:
            process.kill()


def groups_of(image: Image.Image) -> torch.Tensor:
    """The process that loads an image, its group, and its parent."""
    return torch.tensor([os.getpid(), os.getpgid(0), os.getppid()])


def test_loader_workers_are_in_a_process_group_of_their_own() -> None:
    """Ctrl-C and torchrun signal the whole group; the run still needs its workers to finish the update."""
    config = micro_config(**{"data.workers": 1, "optim.batch_per_device": 2, "optim.global_batch": 2})
    source = [(Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8)), 0)] * 4
    split = data.Split(Images(source, groups_of, seed=0), None)
    train, val = data.TrainLoader(split, config, alone()), data.create_eval_loader(split, config, alone())
    for batches in (train.epoch(0), iter(val)):
        worker, group, parent = next(batches).images[0].tolist()
        assert parent == os.getpid() != worker
        assert group == worker != os.getpgid(0)


def test_closed_terminal_ends_a_run_unless_it_is_to_be_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        with signals.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
        with signals.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
