"""Kill a real run of train.py at random moments until it has ended anyway.

    PYTHONPATH=.:tests python tests/end_to_end/kills.py [--kills 40] [--processes 2]

After every kill the output folder is looked at: no checkpoint is damaged, nothing that was saved is lost, and no
process is left. In the end the run is, bit for bit, the one that was never killed. Linux only.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_helpers import AUGMENTED, ROOT, command_line, environment, fingerprint, write_config

from sgconvnext.training.run_folder import RunFolder

MARK = "SGCONVNEXT_KILLED_RUN"  # in the environment of every process of a run
GRACE_S = 60.0  # a run that is asked to stop, and the workers of a killed one, are gone by then on a busy machine too
UPDATE = re.compile(r"^epoch (\d+) update (\d+)/(\d+) ", re.MULTILINE)
KNOBS: dict[str, Any] = AUGMENTED | {"ema.decay": 0.9, "data.workers": 2, "epochs": 4, "save.every": 2}


@dataclass
class Killed:
    """A run and what became of it."""

    folder: Path
    processes: int
    script: tuple[str, ...] = ("train.py",)
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out = self.folder / "out"
        batch = 16 // max(1, self.processes)
        self.config = write_config(self.folder / "a.yaml", **KNOBS, **{"optim.batch_per_device": batch})

    def start(self, *overrides: str, log: Path, restarts: int = 0) -> subprocess.Popen[bytes]:
        line = command_line(
            *self.script, self.config, f"out={self.out}", *overrides, processes=self.processes, restarts=restarts
        )
        variables = environment(**{MARK: str(self.folder)})
        with log.open("wb") as file:
            return subprocess.Popen(line, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)

    def kill(self, number: signal.Signals, pause_s: float) -> bool:
        """One attempt at the run, killed ``pause_s`` after its first update, or, below 0, so long before it may come.

        Returns:
            Whether the run had ended before.
        """
        log = self.folder / f"{len(self.told)}.log"
        before = position(self.out)
        run = self.start("resume=auto", log=log)
        if pause_s < 0:
            time.sleep(-pause_s)
        else:
            while run.poll() is None and not UPDATE.search(log.read_text()):
                time.sleep(0.02)
            time.sleep(pause_s)
        ended = run.poll() is not None
        run.send_signal(number)
        began = time.monotonic()
        code = run.wait(120)
        seconds, text = time.monotonic() - began, log.read_text()
        if ended:
            assert code == 0, (text, self.told)
            return True
        self.told.append(f"{number.name} after {pause_s:.2f} s: exit code {code} in {seconds:.1f} s, {text[-200:]!r}")
        self.look(before, text)
        if number != signal.SIGKILL and UPDATE.search(text) and "best top-1" not in text:
            assert seconds < GRACE_S, self.told
            # torchrun itself ends with 1
            assert code == (1 if self.processes else 128 + number), self.told
            assert f"{number.name}: stopped after" in text, text
            assert position(self.out) == updates(text)[-1], self.told
        return False

    def finish(self, want: str) -> None:
        """Let the run go on to its end, where it has the fingerprint ``want``."""
        log = self.folder / "end.log"
        assert self.start("resume=auto", log=log).wait(300) == 0, log.read_text()
        assert fingerprint(self.out / "last.pth") == want, self.told

    def look(self, before: tuple[int, ...], log: str) -> None:
        """Nothing is lost, damaged or left over."""
        folder = RunFolder(self.out)
        _, damaged = folder.newest()
        assert not damaged, damaged
        saved = position(self.out)
        assert saved >= before, self.told
        if done := updates(log):
            epoch, update = done[-1]
            assert saved >= (epoch, (update - 1) // KNOBS["save.every"] * KNOBS["save.every"]), self.told
        deadline = time.monotonic() + GRACE_S
        while orphans(self.folder):
            assert time.monotonic() < deadline, (orphans(self.folder), self.told)
            time.sleep(0.1)


def updates(log: str) -> list[tuple[int, int]]:
    """Of the log, as (epochs, updates)."""
    return [(int(epoch), int(update)) for epoch, update, _ in UPDATE.findall(log)]


def position(out: Path) -> tuple[int, ...]:
    """Of the newest checkpoint."""
    files = RunFolder(out).files()
    return RunFolder.position(files[0]) if files else (0, 0)


def orphans(folder: Path) -> list[str]:
    """Processes of the run that are still there (Linux)."""
    mark, found = f"{MARK}={folder}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has gone, or is not ours
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(f"{process.name}: {(process / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
    return found


def straight(folder: Path, processes: int) -> str:
    """The fingerprint of the run that nobody kills."""
    folder.mkdir()
    run = Killed(folder, processes)
    log = folder / "straight.log"
    assert run.start(log=log).wait(300) == 0, log.read_text()
    return fingerprint(run.out / "last.pth")


def survive(
    folder: Path, kills: int, processes: int, seed: int, want: str, script: tuple[str, ...] = ("train.py",)
) -> list[str]:
    """Kill a run so many times; it must end with the fingerprint ``want`` of `straight`. Returns what was done."""
    chance, done = random.Random(seed), []
    while len(done) < kills:
        run = Killed(Path(tempfile.mkdtemp(prefix="killed-", dir=folder)), processes, script)
        ended = False
        while not ended and len(done) + len(run.told) < kills:
            number = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
            in_training = chance.random() < 0.8  # else anywhere between the interpreter's start and then
            ended = run.kill(number, chance.uniform(0, 1.5) if in_training else -chance.uniform(0, 6))
        run.finish(want)
        done += run.told
    return done


def restart(folder: Path, kills: int, seed: int, want: str) -> str:
    """SIGKILL one of two processes so many times under one torchrun --max-restarts. Returns its log."""
    place = folder / "restarted"
    place.mkdir()
    run, chance, log = Killed(place, 2), random.Random(seed), place / "run.log"
    torchrun = run.start("resume=auto", log=log, restarts=kills)
    for number in range(kills):
        while torchrun.poll() is None and log.read_text().count("disk: ") <= number:
            time.sleep(0.05)
        time.sleep(chance.uniform(0.1, 1.5))
        ranks = [pid for pid in map(int, children(torchrun.pid)) if os.path.exists(f"/proc/{pid}")]
        os.kill(chance.choice(ranks), signal.SIGKILL)
    assert torchrun.wait(300) == 0, log.read_text()
    assert fingerprint(run.out / "last.pth") == want, log.read_text()
    run.look((0, 0), "")
    return log.read_text()


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--processes", type=int, default=0, help="under torchrun; 0: by itself")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    print(f"seed {given.seed}")  # noqa: T201
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        unkilled = straight(folder / "straight", given.processes)
        print("\n".join(survive(folder, given.kills, given.processes, given.seed, unkilled)))  # noqa: T201
