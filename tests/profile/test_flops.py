"""Counts by stage and part against formulas written out by hand, and timm's published GMACs."""

import math
from typing import Any

import pytest
import timm
import torch
from helpers import SMALL, refused, small_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sgconvnext.profile.flops import (
    CONVOLUTION,
    HEAD,
    KERNEL,
    MLP,
    NORM,
    OTHER,
    PARTS,
    STEM,
    Cost,
    Count,
    UncountedError,
    count,
)

# small_model: maps of 16x16, 8x8, 4x4 and 2x2 tokens, one block each, d = 16, 4, 1, 1
CHANNELS, TOKENS, TAPS = (8, 16, 24, 32), (256, 64, 16, 4), (16, 4, 1, 1)
BLOCKS = ((16, 16), (8, 8), (1, 16), (1, 8))  # that longconv.dft cuts the tokens into


# the same with rows that are three columns apart: H (W + 3) tokens; d, N, and the taps that are interpolated
GAP3 = {"row_gap": 3, "bias": True}
GAP_TOKENS = (16 * 19, 8 * 11, 4 * 7, 2 * 5)
GAP_SCALES = ((31, 5), (19, 4), (13, 3), (10, 1))
GAP_INTERPOLATED = (62 + 124 + 248, 38 + 76, 26, 0)  # scales 2, 3, 4 of 2d, 4d, 8d taps


def images(batch: int = 1, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(batch, 3, *size)


def total(counted: Count, part: str, stage: int) -> Any:
    return counted.total(str(stage + 1), part)


def by_fft(batch: int, channels: int, n: int) -> float:
    """MACs: half of 2.5 n log2 n per transform, of x and y per image and of the taps once; 3 per complex product."""
    transform = round(2.5 * n * math.log2(n)) / 2
    return channels * ((2 * batch + 1) * transform + 3 * batch * (n // 2 + 1))


def by_matrix_products(batch: int, channels: int, n: int, b: int) -> int:
    """MACs: W (2n, n), M (n, 2b, 2b) and W^T per image; once per channel, waves (2n, 2n-1) for 2b-1 lags."""
    return channels * (batch * (4 * n * n * b + 4 * n * b * b) + 2 * n * (2 * n - 1) * (2 * b - 1))


def interpolated(taps: int, tokens: int) -> int:
    """Taps that are interpolated of a kernel with five scales d, d, 2d, 4d, 8d, each only if a tap of it is used."""
    lengths = [taps, taps, 2 * taps, 4 * taps, 8 * taps]
    return sum(length for i, length in enumerate(lengths) if i > 1 and sum(lengths[:i]) < tokens)


@pytest.mark.parametrize(("backend", "batch"), [("fft", 3), ("toeplitz", 1), ("dft", 3), ("reference", 1)])
def test_every_part_of_every_stage_is_what_the_formula_says(backend: str, batch: int) -> None:
    counted = count(small_model(backend=backend), images(batch))
    for stage, (channels, tokens, taps) in enumerate(zip(CHANNELS, TOKENS, TAPS, strict=True)):
        convolution = total(counted, CONVOLUTION, stage)
        assert convolution.macs == by_fft(batch, channels, 2 * tokens)
        executed = {
            "fft": by_fft(batch, channels, max(16, 2 * tokens)),
            "dft": by_matrix_products(batch, channels, *BLOCKS[stage]),
        }
        assert convolution.executed == executed.get(backend, batch * channels * tokens**2)
        assert convolution.activations == batch * channels * tokens
        assert total(counted, KERNEL, stage).macs == 2 * channels * interpolated(taps, tokens) * 3 / 2
        assert total(counted, MLP, stage).macs == batch * tokens * channels * 4 * channels * 2
        assert total(counted, NORM, stage).macs == batch * tokens * channels * 5
        if stage > 0:
            before = CHANNELS[stage - 1]
            downsampling = tokens * channels * before * 4 + TOKENS[stage - 1] * before * 5
            assert total(counted, STEM, stage).macs == batch * downsampling
    assert counted.total("stem").macs == batch * (256 * 8 * 3 * 16 + 256 * 8 * 5)
    assert counted.total(part=HEAD).macs == batch * (4 * 32 + 32 * 5 + 32 * 10)  # pooling, norm, classifier
    assert counted.total(part=OTHER) == Cost()
    assert counted.total().macs == sum(counted.total(part=part).macs for part in PARTS)
    assert all(type(number) in (int, float) for number in vars(counted.total()).values())  # tracing makes tensors


@pytest.mark.parametrize(("backend", "batch"), [("fft", 3), ("toeplitz", 1), ("reference", 3)])
def test_gap_is_convolved_too_and_all_else_costs_what_it_costs_without(backend: str, batch: int) -> None:
    """fvcore's convention: a pad, a slice and the sum with a bias are free."""
    x = images(batch)
    counted, plain = (count(small_model(backend=backend, **options), x) for options in (GAP3, {}))
    for stage, (channels, tokens) in enumerate(zip(CHANNELS, GAP_TOKENS, strict=True)):
        convolution = total(counted, CONVOLUTION, stage)
        assert convolution.macs == by_fft(batch, channels, 2 * tokens)
        padded = (640, 192, 64, 32)[stage]  # at least 2 H (W + 3) - 1 points, as longconv.fft rounds them up
        products = batch * channels * tokens**2
        assert convolution.executed == (by_fft(batch, channels, padded) if backend == "fft" else products)
        assert convolution.activations == total(plain, CONVOLUTION, stage).activations
        assert total(counted, KERNEL, stage).macs == 2 * channels * GAP_INTERPOLATED[stage] * 3 / 2
        for part in (STEM, MLP, NORM):
            assert total(counted, part, stage) == total(plain, part, stage)
        d, scales = GAP_SCALES[stage]
        assert total(counted, KERNEL, stage).parameters == 2 * scales * channels * d + channels
        assert convolution.parameters == channels  # the bias, as in ConvNeXt
    assert counted.total(part=HEAD) == plain.total(part=HEAD)
    assert counted.total(part=OTHER) == Cost()
    assert counted.total().parameters == sum(parameter.numel() for parameter in small_model(**GAP3).parameters())


def test_dilated_layer_has_a_gap_in_every_subsampled_map() -> None:
    model = small_model(output_stride=8, backend="toeplitz", **GAP3)
    counted = count(model, images())
    assert total(counted, CONVOLUTION, 3).macs == by_fft(4**2, 32, 2 * 2 * 5)  # 8x8 tokens, every fourth: 16 of 2x2
    assert total(counted, CONVOLUTION, 3).executed == 4**2 * 32 * (2 * 5) ** 2
    assert total(counted, CONVOLUTION, 3).activations == 32 * 8 * 8


def test_executed_transforms_are_as_long_as_the_backend_pads_them() -> None:
    counted = count(small_model(img_size=(52, 44), backend="fft"), images(1, (52, 44)))
    assert counted.total("1", CONVOLUTION).macs == by_fft(1, 8, 2 * 143)
    assert counted.total("1", CONVOLUTION).executed == by_fft(1, 8, 288)  # 16 * 18, the next of its kind after 285
    assert counted.total("1", MLP).executed == counted.total("1", MLP).macs


@pytest.mark.parametrize("options", [{}, GAP3], ids=["plain", "gap3"])
@pytest.mark.parametrize("backend", ["fft", "toeplitz", "dft"])
def test_torch_counts_the_same_flops(backend: str, options: dict[str, Any]) -> None:
    """FlopCounterMode looks below autograd, at what runs; it leaves norms and pooling out."""
    model, x = small_model(backend=backend, **options), images(2)
    counted = count(model, x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    norms = sum(5 * math.prod(shape) for shape in _norm_shapes(model, x)) + 2 * 32 * 4
    assert counter.get_total_flops() == 2 * (counted.total().executed - norms)


def _norm_shapes(model: nn.Module, x: Tensor) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    with torch.no_grad():
        model(x)
    return shapes


@pytest.mark.parametrize(
    ("size", "gmacs", "activations"),
    [("tiny", "4.47", "13.44"), pytest.param("small", "8.71", "21.56", marks=pytest.mark.end_to_end)],
)
def test_convnext_has_the_counts_that_timm_publishes(size: str, gmacs: str, activations: str) -> None:
    counted = count(timm.create_model(f"convnext_{size}"), images(1, (224, 224)))
    assert f"{counted.total().macs / 1e9:.2f}" == gmacs
    assert f"{counted.total().activations / 1e6:.2f}" == activations
    assert counted.total(part=OTHER).macs == 0
    assert counted.total(part=KERNEL).macs == 0


def test_activations_are_those_of_convnext() -> None:
    """The same maps pass through both."""
    theirs = count(timm.create_model("convnext_atto", **{**SMALL, "img_size": None}), images()).total()
    assert count(small_model(), images()).total().activations == theirs.activations


def test_share_of_the_transforms_is_not_zero() -> None:
    counted = count(small_model(backend="fft"), images())
    assert counted.total(part=CONVOLUTION).macs > 0.05 * counted.total().macs


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", 1.82),
        ("vit_tiny_patch16_224", 1.26),
        ("swin_tiny_patch4_window7_224", 4.51),
        ("poolformer_s12", 1.82),
    ],
)
def test_other_models_have_their_published_gmacs(name: str, published: float) -> None:
    macs = count(timm.create_model(name), images(1, (224, 224))).total().macs / 1e9
    assert macs == pytest.approx(published, rel=0.02)


def test_parameters_are_those_of_each_part() -> None:
    model = small_model()
    counted = count(model, images())
    for stage, (channels, taps) in enumerate(zip(CHANNELS, TAPS, strict=True)):
        assert total(counted, KERNEL, stage).parameters == 2 * 5 * channels * taps + channels  # w and D
        assert total(counted, CONVOLUTION, stage).parameters == 0
        assert total(counted, MLP, stage).parameters == 8 * channels**2 + 5 * channels
        assert total(counted, NORM, stage).parameters == 3 * channels  # and layer scale
    assert counted.total("stem").parameters == 8 * 3 * 16 + 8 + 2 * 8
    assert counted.total(part=HEAD).parameters == 2 * 32 + 10 * 32 + 10
    assert counted.total().parameters == sum(parameter.numel() for parameter in model.parameters())


def test_what_is_in_no_part_is_the_rest() -> None:
    counted = count(timm.create_model("resnet18"), images())
    assert list(counted.costs) == [("rest", OTHER)]
    assert counted.total().parameters == 11_689_512


def test_model_that_cannot_run_is_refused() -> None:
    with refused("ConvNeXt", "(1, 3, 8, 8)"):
        count(timm.create_model("convnext_atto"), images(1, (8, 8)))


class Fused(nn.Module):
    """The Triton operators of a block, which run on the meta device without a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3, device="meta")
        self.gamma = nn.Parameter(torch.empty(3, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        from sgconvnext.longconv.triton.block import layer_norm_channels_last, scale_residual_channels_first

        tokens = x.flatten(2)
        y = layer_norm_channels_last(tokens, self.norm.weight, self.norm.bias, self.norm.eps, torch.bfloat16)
        return scale_residual_channels_first(tokens, y, self.gamma).reshape(x.shape)


def test_triton_norm_costs_what_a_norm_costs_and_the_residual_nothing() -> None:
    pytest.importorskip("triton", reason="the block's Triton operators need triton")
    x = images(2, (8, 6)).to("meta")
    assert count(Fused(), x).total().macs == count(nn.LayerNorm(6, device="meta"), x).total().macs == 5 * x.numel()
    with FlopCounterMode(display=False) as counter:
        Fused()(x).sum().backward()
    assert counter.get_total_flops() == 0  # as for torch's own norms and sums


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


def test_operation_that_nobody_counts_is_an_error() -> None:
    with refused("Unknown", "aten::cumsum", "HANDLERS"):
        count(Unknown(), images())
    with pytest.raises(UncountedError):
        count(Unknown(), images())
    with refused("einsum", "two operands"):
        count(Einsum(), images())


class Einsum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,bchw,bchw->b", x, x, x)
