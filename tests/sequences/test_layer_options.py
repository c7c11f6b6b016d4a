"""What SGConv offers beyond images: heads, layouts, learned exponents, nearest upsampling, norms over all taps."""

from typing import Any

import pytest
import torch
from helpers import refused, relative_error
from torch import Tensor, nn

from sgconvnext import SGConv
from sgconvnext.longconv import reference
from sgconvnext.models import generator
from sgconvnext.models.kernel import lag_taps


@pytest.mark.parametrize("bidirectional", [False, True])
def test_heads_are_layers_side_by_side(bidirectional: bool) -> None:
    layer, x = SGConv(3, 40, heads=2, bidirectional=bidirectional, scale_dim=8), torch.randn(2, 3, 33)
    y, kernel = layer(x, return_kernel=True)
    assert y.shape == (2, 6, 33)
    assert kernel.shape == (1 + bidirectional, 6, 33)
    assert relative_error(layer(x), y) <= 2e-6
    for i in range(2):
        one = SGConv(3, 40, bidirectional=bidirectional, scale_dim=8)
        own = {
            "weight": layer.weight[i::2],
            "skip": layer.skip[3 * i : 3 * i + 3],
            "kernel_norm": layer.kernel_norm[i::2],
        }
        one.load_state_dict(own)
        assert relative_error(y[:, 3 * i : 3 * i + 3], one(x)) <= 2e-6
    assert relative_error(layer.kernel().norm(dim=-1), torch.ones(1 + bidirectional, 6)) <= 1e-6


def test_tokens_before_channels_is_the_transpose() -> None:
    first, last = SGConv(3, 40), SGConv(3, 40, channels_last=True)
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 40)
    assert torch.equal(last(x.mT), first(x).mT)
    with refused("(2, 3, 40)", "(B, L, C)", "C=3"):
        last(x)


def test_learned_exponent_begins_as_the_fixed_one_and_has_a_gradient() -> None:
    learned = SGConv(3, 40, decay="position", exponent=0.7, learn_exponent=True)
    fixed = SGConv(3, 40, decay="position", exponent=0.7)
    assert learned.exponent is not None
    assert learned.exponent.tolist() == pytest.approx([0.7] * 3)
    state = {key: value for key, value in learned.state_dict().items() if key != "exponent"}
    fixed.load_state_dict(state)
    x = torch.randn(2, 3, 40)
    assert relative_error(learned(x), fixed(x)) <= 2e-6
    learned.double()
    assert torch.autograd.gradcheck(
        lambda exponent: torch.func.functional_call(learned, {"exponent": exponent}, (x.double(),)),
        (learned.exponent,),
    )


def test_inference_notices_a_changed_exponent() -> None:
    layer, x = SGConv(3, 40, decay="position", learn_exponent=True).eval(), torch.randn(1, 3, 40)
    with torch.no_grad():
        before = layer(x)
        assert layer.exponent is not None
        layer.exponent.data += 1
        after = layer(x)
        want = reference.long_conv(x, lag_taps(layer.kernel(), layer.skip))
    assert relative_error(after, before) >= 1e-2
    assert relative_error(after, want) <= 2e-6


def test_nearest_repeats_every_parameter() -> None:
    layer = SGConv(1, 16, scale_dim=2, upsample="nearest", alpha=0.5)
    [[[a], [b], [c], [d]]] = layer.weight.detach()
    want = torch.cat([a, b / 2, c.repeat_interleave(2) / 4, d.repeat_interleave(4) / 8])
    assert relative_error(layer.kernel()[0, 0], want / layer.kernel_norm[0, 0]) <= 1e-6


def test_norm_over_the_whole_is_that_of_the_taps_before_they_are_cut() -> None:
    whole = SGConv(3, 40, scale_dim=10, norm_over="whole")  # 10 + 10 + 20
    assert relative_error(whole.kernel().norm(dim=-1), torch.ones(1, 3)) <= 1e-6
    cut = SGConv(3, 30, scale_dim=10, norm_over="whole")
    cut.load_state_dict(whole.state_dict() | {"kernel_norm": cut.kernel_norm})
    assert relative_error(cut.kernel(), whole.kernel()[..., :30] * whole.kernel_norm / cut.kernel_norm) <= 1e-6
    torch.manual_seed(0)
    whole = SGConv(3, 40, scale_dim=10, norm_over="whole")
    torch.manual_seed(0)
    cut = SGConv(3, 30, scale_dim=10, norm_over="whole")
    assert torch.equal(cut.kernel_norm, whole.kernel_norm)


OPTIONS: list[dict[str, Any]] = [{"heads": 3, "bidirectional": True}, {"decay": "position", "learn_exponent": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunks_of_channels_give_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = SGConv(7, 50, **options), torch.randn(2, 7, 50)

    def results() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]

    whole = results()
    monkeypatch.setattr(generator, "TAPS_BYTES", 0)
    monkeypatch.setattr(generator, "CHUNK_BYTES", 4 * 50 * layer.heads * 3)
    assert len(layer.chunks()) == 3
    assert max(map(relative_error, results(), whole)) <= 5e-6


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_survive_saving_reparameterizing_and_compiling(options: dict[str, Any]) -> None:
    layer, x = SGConv(3, 50, **options).eval(), torch.randn(2, 3, 50)
    other = SGConv(3, 50, **options)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(other(x), want)
        assert relative_error(torch.compile(layer, backend="aot_eager")(x), want) <= 2e-6
        layer.reparameterize()
        assert relative_error(layer(x), want) <= 2e-6
    assert [name for name, _ in layer.named_parameters()] == []


def test_a_short_signal_has_fewer_taps_by_default() -> None:
    assert SGConv(2, 5).weight.shape == (1, 1, 2, 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, ("length=0", "at least 1")),
        ({"scale_dim": 41}, ("scale_dim=41", "length=40", "at most 40")),
        ({"heads": 0}, ("heads=0", "at least 1")),
        ({"heads": 1.5}, ("heads=1.5", "whole number")),
        ({"alpha": 0}, ("alpha=0", "positive")),
        ({"alpha": ()}, ("alpha=()", "pair")),
        ({"upsample": "cubic"}, ("cubic", "linear, nearest")),
        ({"norm_over": "all"}, ("all", "used, whole")),
        ({"learn_exponent": True}, ("learn_exponent", "decay='position'")),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(*words):
        SGConv(**{"channels": 3, "length": 40} | options)


def test_layer_is_a_module_like_any_other() -> None:
    model = nn.Sequential(SGConv(3, 40, heads=2), nn.GELU(), nn.Conv1d(6, 3, 1))
    model(torch.randn(2, 3, 40)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "heads=2" in repr(model[0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("length", "r"), [(40, 2), (41, 2), (40, 3), (5, 7)])
def test_every_r_th_token_meets_the_sum_of_r_taps(length: int, r: int, bidirectional: bool) -> None:
    whole = SGConv(3, length, bidirectional=bidirectional)
    some = SGConv(3, length, bidirectional=bidirectional, subsample=r)
    some.load_state_dict(whole.state_dict())
    kernel, tokens = whole.kernel().detach(), -(-length // r)
    sums = torch.stack([kernel[..., r * i : r * i + r].sum(-1) for i in range(tokens)], dim=-1)
    x = torch.randn(2, 3, tokens)
    want = reference.long_conv(x.double(), lag_taps(sums, whole.skip.detach()).double())
    assert relative_error(some(x), want) <= 2e-6
    if tokens > 1:
        short = reference.long_conv(x[..., 1:].double(), lag_taps(sums[..., :-1], whole.skip.detach()).double())
        assert relative_error(some(x[..., 1:]), short) <= 2e-6
    with refused(f"{tokens + 1} tokens", f"length={(tokens + 1) * r}"):
        some(torch.zeros(1, 3, tokens + 1))
    if not bidirectional:
        _, state = some.prefill(x[..., :-1]) if tokens > 1 else (None, None)
        assert relative_error(some.step(x[..., -1], state)[0], want[..., -1]) <= 2e-6
    some.eval().reparameterize()
    assert relative_error(some(x), want) <= 2e-6


def test_smooth_signal_at_half_the_rate_gives_nearly_the_same_outputs() -> None:
    """What the test at another rate needs: the sum over taps stands for the same integral."""
    layer, half = SGConv(1, 2000, scale_dim=64), SGConv(1, 2000, scale_dim=64, subsample=2)
    half.load_state_dict(layer.state_dict())
    layer.skip.data.zero_()
    half.skip.data.zero_()
    x = torch.sin(torch.arange(2000) / 200)[None, None]
    assert relative_error(half(x[..., ::2])[..., 50:], layer(x)[..., ::2][..., 50:]) <= 0.02
