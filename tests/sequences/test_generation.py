"""SGConv token by token: equal to forward, in few reads, for batches that grow and shrink."""

import copy
from typing import Any

import pytest
import torch
from helpers import refused, relative_error
from torch import Tensor

from sgconvnext import SGConv
from sgconvnext.models import generator
from sgconvnext.sequences import generation
from sgconvnext.sequences.cache import ROOM
from sgconvnext.sequences.generation import Bends, ConvState

OPTIONS: list[dict[str, Any]] = [
    {},
    {"heads": 3},
    {"scale_dim": 1},
    {"num_scales": 1},
    {"upsample": "nearest", "scale_dim": 4},
    {"alpha": (1, 1 / 3), "scale_dim": 5},
    {"decay": "position"},
    {"decay": "position", "learn_exponent": True, "heads": 2},
]


def by_steps(layer: SGConv, x: Tensor, state: ConvState | None = None) -> tuple[Tensor, ConvState]:
    steps = []
    for token in x.unbind(-1):
        y, state = layer.step(token, state)
        steps.append(y)
    assert state is not None
    return torch.stack(steps, dim=-1), state


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 33, 700])
def test_steps_and_chunks_give_what_forward_gives(length: int, options: dict[str, Any]) -> None:
    options = options | ({"scale_dim": min(options["scale_dim"], length)} if "scale_dim" in options else {})
    layer, x = SGConv(3, length, **options), torch.randn(2, 3, length) + 0.5
    with torch.no_grad():
        want = layer(x)
    assert relative_error(by_steps(layer, x)[0], want) <= 2e-6
    state, chunks = None, []
    for part in x.split(max(1, length // 3), dim=-1):
        y, state = layer.prefill(part, state)
        chunks.append(y)
    assert relative_error(torch.cat(chunks, dim=-1), want) <= 2e-6


def test_far_taps_are_read_as_sums_and_lose_nothing_after_many_inputs() -> None:
    """Inputs whose mean is not zero, so that their sums of sums grow with the square of the tokens."""
    length = 2**16
    layer, x = SGConv(2, length, scale_dim=8), torch.randn(1, 2, length) + 3
    with torch.no_grad():
        want = layer(x)
    _, state = layer.prefill(x[..., :-50])
    got, state = by_steps(layer, x[..., -50:], state)
    assert relative_error(got, want[..., -50:]) <= 2e-6
    assert len(state.bends.near) == 32  # 4 d
    assert len(state.bends.lags) <= 11 * 18  # 2 d + 2 for each of the 11 far scales


@pytest.mark.parametrize("upsample", ["linear", "nearest"])
@pytest.mark.parametrize("length", [1000, 1024, 601])
def test_second_differences_are_zero_wherever_a_step_does_not_look(length: int, upsample: str) -> None:
    layer = SGConv(3, length, scale_dim=16, upsample=upsample, dtype=torch.float64)
    taps = layer.built_taps().detach().clone()
    near = len(Bends(layer).near)
    taps[:, :near] = 0
    padded = torch.nn.functional.pad(taps, (2, 0))
    change = padded[:, 2:] - 2 * padded[:, 1:-1] + padded[:, :-2]
    lags = Bends(layer).lags
    elsewhere = change.clone()
    elsewhere[:, lags] = 0
    assert float(elsewhere.abs().max()) <= 1e-14
    assert float(change[:, lags].abs().max()) >= 1e-3


def test_reparameterized_layer_generates_too() -> None:
    layer, x = SGConv(3, 300), torch.randn(2, 3, 40)
    with torch.no_grad():
        want = layer(x)
    layer.reparameterize()
    assert relative_error(by_steps(layer, x)[0], want) <= 2e-6


def test_batch_shrinks_grows_and_is_reordered() -> None:
    layer, x = SGConv(3, 500, scale_dim=4), torch.randn(3, 3, 200)
    with torch.no_grad():
        want = layer(x)
    _, old = layer.prefill(x[..., :150])
    _, young = layer.prefill(x[1:2, :, :60])
    joined = old[[2, 0]].join(young)
    assert len(joined) == 3
    y, joined = layer.step(torch.stack([x[2, :, 150], x[0, :, 150], x[1, :, 60]]), joined)
    assert relative_error(y, torch.stack([want[2, :, 150], want[0, :, 150], want[1, :, 60]])) <= 2e-6
    rest = joined[torch.tensor([2])]
    assert rest.count == 61  # what only the others have seen is gone
    y, _ = layer.step(x[1:2, :, 61], rest)
    assert relative_error(y, want[1:2, :, 61]) <= 2e-6
    y, _ = layer.step(x[[2], :, 151], joined[0:1])
    assert relative_error(y, want[[2], :, 151]) <= 2e-6


def test_rows_of_a_state_are_a_copy() -> None:
    layer, x = SGConv(2, 50), torch.randn(2, 2, 20)
    _, state = layer.prefill(x[..., :10])
    branch = state[:]
    layer.step(torch.randn(2, 2), branch)
    assert (state.count, branch.count) == (10, 11)
    with torch.no_grad():
        want = layer(x[..., :11])[..., -1]
    assert relative_error(layer.step(x[..., 10], state)[0], want) <= 2e-6


def test_state_has_memory_for_its_tokens_and_no_more_than_the_length() -> None:
    layer = SGConv(2, 100)
    _, state = layer.step(torch.randn(1, 2))
    assert state.parts[0].shape == (1, ROOM, 2)
    _, state = layer.prefill(torch.randn(1, 2, ROOM), state)
    assert state.parts[0].shape == (1, 100, 2)


def test_generation_refuses_what_it_cannot_do() -> None:
    layer, x = SGConv(3, 20), torch.randn(2, 3)
    _, state = layer.step(x)
    with refused("x has 1 samples", "the state 2", "state[rows]"):
        layer.step(x[:1], state)
    with refused("another layer", "one state for every layer"):
        SGConv(3, 20).step(x, state)
    with refused("two layers"):
        state.join(SGConv(3, 20).step(x)[1])
    with refused("21", "length=21"):
        layer.prefill(torch.randn(2, 3, 20), state)
    assert state.count == 1  # a refused chunk leaves the state as it was
    for how in ("step", "prefill"):
        with refused("bidirectional", "future"):
            getattr(SGConv(3, 20, bidirectional=True), how)(x if how == "step" else x[..., None])


def test_failed_chunk_leaves_the_state_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = SGConv(3, 50), torch.randn(2, 3, 30)
    _, state = layer.prefill(x[..., :10])
    with monkeypatch.context() as patched:
        patched.setattr(generation, "long_conv", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layer.prefill(x[..., 10:], state)
    with torch.no_grad():
        want = layer(x)
    assert relative_error(layer.prefill(x[..., 10:], state)[0], want[..., 10:]) <= 2e-6


def test_state_is_copied_by_deepcopy_and_leaves_inference_mode() -> None:
    layer, x = SGConv(2, 50), torch.randn(2, 2, 20)
    with torch.inference_mode():
        _, state = layer.prefill(x[..., :10])
    branch = copy.deepcopy(state)
    with torch.no_grad():
        want = layer(x[..., :11])[..., -1]
    for each in (branch, state):
        assert relative_error(layer.step(x[..., 10], each)[0], want) <= 2e-6


def test_states_that_do_not_belong_together_are_refused() -> None:
    layer, x = SGConv(3, 300, scale_dim=4), torch.randn(2, 3)
    _, state = layer.step(x)
    with refused("torch.float64", "torch.float32"):
        layer.step(x.double(), state)
    with refused("one dimension", "state[[0]]"):
        state[torch.tensor(0)]
    with refused("Tensor", "step() or prefill()"):
        layer.step(x, x[..., None])  # type: ignore[arg-type]
    layer.reparameterize()
    with refused("stays as it is"):
        state.join(layer.step(x)[1])


def test_first_step_makes_no_taps_of_all_channels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SGConv(5, 400, scale_dim=4)
    whole = Bends(layer)
    monkeypatch.setattr(generator, "TAPS_BYTES", 0)
    monkeypatch.setattr(generator, "CHUNK_BYTES", 2 * 4 * 400)
    assert len(layer.chunks()) == 3
    assert relative_error(Bends(layer).changes, whole.changes) <= 1e-12


def test_channels_last_is_taken_in_chunks() -> None:
    layer = SGConv(3, 30, channels_last=True, heads=2)
    x = torch.randn(2, 30, 3)
    with torch.no_grad():
        want = layer(x)
    first, state = layer.prefill(x[:, :20])
    assert relative_error(torch.cat([first, layer.prefill(x[:, 20:], state)[0]], dim=1), want) <= 2e-6
