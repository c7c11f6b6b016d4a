"""Random numbers: every generator is seeded, taken up again where it was, and kept apart where it must be."""

import random

import numpy as np
import pytest
import torch

from sgconvnext.training import rng

CPU = torch.device("cpu")


def draw() -> list[float]:
    """Two numbers of each generator; normal ones come in pairs, of which a state must keep the second."""
    return [
        *(random.random(), random.gauss(0, 1)),
        *(float(np.random.rand()), float(np.random.randn())),
        *torch.rand(1).tolist(),
        *torch.randn(1).tolist(),
    ]


def test_same_seed_gives_the_same_numbers_and_rank_epoch_and_seed_others() -> None:
    drawn = []
    for key in [(0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, None), (0, 1, None)]:
        rng.seed(*key)
        drawn.append(tuple(draw()))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == len(drawn) - 1
    assert all(len({numbers[i] for numbers in drawn}) == len(drawn) - 1 for i in range(6)), "a generator is not seeded"


@pytest.mark.parametrize("drawn_before", range(4))
def test_restored_state_goes_on_where_it_was_taken(drawn_before: int) -> None:
    rng.seed(3, 0, 0)
    for _ in range(drawn_before):
        random.gauss(0, 1)
        np.random.randn()
        torch.randn(1)
    state = rng.state(CPU)
    want = [draw() for _ in range(3)]
    draw()
    rng.restore(state, CPU)
    assert [draw() for _ in range(3)] == want


def test_state_survives_a_checkpoint_that_runs_no_code(tmp_path: object) -> None:
    random.gauss(0, 1)
    np.random.randn()
    state = rng.state(CPU)
    want = draw()
    torch.save(state, f"{tmp_path}/rng.pth")
    rng.restore(torch.load(f"{tmp_path}/rng.pth", weights_only=True), CPU)
    assert draw() == want


def test_stream_depends_on_its_key_alone_and_leaves_no_trace() -> None:
    rng.seed(0, 0, 0)
    draw()
    want = draw()
    rng.seed(0, 0, 0)
    draw()
    streams = []
    for key in [(5, 1, 7), (5, 1, 8), (5, 2, 7), (6, 1, 7)]:
        with rng.stream(*key):
            streams.append(tuple(draw()))
    assert draw() == want
    with rng.stream(5, 1, 7):
        assert tuple(draw()) == streams[0]
    assert len(set(streams)) == 4


def test_stream_gives_the_random_numbers_back_after_an_error() -> None:
    def broken() -> None:
        with rng.stream(1):
            torch.rand(1)
            raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        broken()
    assert torch.equal(torch.get_rng_state(), before)
