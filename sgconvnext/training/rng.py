"""Random numbers that a stopped run can take up again: three generators of the CPU, and the device's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed(number: int, rank: int, epoch: int | None = None) -> None:
    """Seed Python, NumPy and torch: by seed + rank for the weights, as ConvNeXt does; each epoch has a stream."""
    drawn = (number + rank) % 2**32 if epoch is None else _mix(number, rank, epoch)  # NumPy takes no larger seed
    _seed_cpu(drawn)
    torch.manual_seed(drawn)  # seeds CUDA too


@contextmanager
def stream(*key: int) -> Iterator[None]:
    """Whatever the block draws on the CPU depends on ``key`` alone, and nothing outside notices that it drew.

    A sample augmented in such a block is the same in whichever process, and after whatever others, it is loaded.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(_mix(*key))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def state(device: torch.device) -> dict[str, Any]:
    """Every generator's state as tensors and plain numbers, which torch.load(weights_only=True) accepts."""
    version, words, gauss = random.getstate()
    drawn: Any = np.random.get_state(legacy=True)
    name, keys, *rest = drawn
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), *(float(item) for item in rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore(saved: dict[str, Any], device: torch.device) -> None:
    """Put all generators back to where `state` found them."""
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(saved["torch"])
    if device.type == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"], device)


def _mix(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _seed_cpu(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)  # torch.manual_seed would reach for CUDA
