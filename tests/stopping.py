"""train.py that asks itself to stop in a given update: python tests/stopping.py NUMBER [arguments of train.py]."""

import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from sgconvnext import engine


def stop_after(updates: int) -> Any:
    """engine.train_update that behaves as if SIGTERM came during the update of that number."""
    original, done = engine.train_update, 0

    def update(t: engine.Training, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == updates:
            t.stop.received = signal.SIGTERM
        return original(t, *arguments)

    return update


if __name__ == "__main__":
    engine.train_update = stop_after(int(sys.argv.pop(1)))
    train.main()
