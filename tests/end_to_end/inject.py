"""train.py with one fault put into it: python tests/end_to_end/inject.py FAULT [arguments of train.py].

stop:N         asks itself to stop in its N-th update
nan:N:R        rank R's N-th update sees an image of NaN
worker:N       the loader worker that loads the N-th image kills itself, once for each output folder
full:N         the disk has no room from the N-th checkpoint on
links:N        the disk has no symbolic links, and from N = 2 on no hard links either
slow:S         every update takes S seconds longer
"""

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from sgconvnext.training import checkpoint, checksum, engine, images, run_folder


def around_updates(act: Any) -> None:
    """Call ``act(training, number)`` in every update, after its first batch has come."""
    original, done = engine.train_update, 0

    def update(t: engine.Training, batches: Any, *rest: Any) -> Any:
        nonlocal done
        done += 1
        first = next(batches)
        first = act(t, done, first) or first
        return original(t, (batch for part in ([first], batches) for batch in part), *rest)

    engine.train_update = update


def stop(number: int, rank: int) -> None:
    def act(t: engine.Training, done: int, batch: images.Batch) -> None:
        if done == number and t.world.rank == rank:
            t.stop.received = signal.SIGTERM

    around_updates(act)


def nan(number: int, rank: int) -> None:
    def act(t: engine.Training, done: int, batch: images.Batch) -> images.Batch | None:
        bad = done == number and t.world.rank == rank
        return batch._replace(images=batch.images * float("nan")) if bad else None

    around_updates(act)


def worker(number: int) -> None:
    original = images.Images.__getitem__
    [out] = [Path(text[4:]) for text in sys.argv if text.startswith("out=")]
    died = out.with_name(out.name + ".died")

    def getitem(dataset: images.Images, index: int) -> images.Sample:
        if index == number and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(dataset, index)

    images.Images.__getitem__ = getitem


def full(number: int) -> None:
    original, saved = checkpoint.save, 0
    run_folder.RETRY_S = 0.0

    def write(file: Any, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(path: Path, state: Any) -> None:
        nonlocal saved
        saved += 1
        if saved >= number:
            checksum.HashingFile.write = write
        original(path, state)

    checkpoint.save = save


def links(number: float) -> None:
    def fails(path: Path, target: object, *_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    for call in ("symlink_to", "hardlink_to")[: int(number)]:
        setattr(Path, call, fails)


if __name__ == "__main__":
    name, *values = sys.argv.pop(1).split(":")
    {"stop": stop, "nan": nan, "worker": worker, "full": full, "links": links}[name](*map(float, values))
    train.main()
