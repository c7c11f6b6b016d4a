"""FlopCounterMode after ``import sgconvnext`` alone, in a process of its own, and the rules for other counters."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BACKENDS_HERE, GAP, GATED, random_gates, small_model
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sgconvnext
from sgconvnext.longconv import BACKENDS, cost
from sgconvnext.models.kept import _KEPT
from sgconvnext.profile.flops import CONVOLUTION, KERNEL, count
from sgconvnext.profile.layer_cost import PTFLOPS, THOP

ALONE = f"""
import json, sys, timm, torch
from torch.utils.flop_counter import FlopCounterMode

def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()

def infer(model, images):
    with torch.no_grad():
        return model(images)

images = torch.randn(2, 3, 64, 64)
theirs = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)).eval()
found = {{"convnext": [counted(lambda: theirs(images).sum().backward())]}}
import sgconvnext
found["convnext"].append(counted(lambda: theirs(images).sum().backward()))
for backend in {BACKENDS_HERE}:
    layer, x = sgconvnext.SGConv2d(2, 7, backend=backend).eval(), torch.randn(3, 2, 7, 7, requires_grad=True)
    found[backend] = [
        counted(lambda: infer(layer, x)),
        counted(lambda: infer(layer, x)),  # with what the first call kept
        counted(lambda: layer(x).sum().backward()),
    ]
size = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), img_size=64, num_classes=10)
ours = timm.create_model("sgconvnext_atto", **size).eval()
found["sgconvnext"] = counted(lambda: infer(ours, images))
found["imported"] = [name for name in ("fvcore", "sgconvnext.profile") if name in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    root = Path(sgconvnext.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=root, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def flops(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


# of the layer above: 5 scales of 4 taps, of which 8, 16 and 32 are interpolated, in 2 directions of 2 channels
KERNEL_FLOPS = 2 * 2 * (8 + 16 + 32) * 3


@pytest.mark.end_to_end
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_import_alone_makes_torch_count_a_layer_forward(backend: str, alone: dict[str, Any]) -> None:
    assert alone[backend][0] == BACKENDS[backend].flops(3, 2, 49, 97) + KERNEL_FLOPS


@pytest.mark.end_to_end
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_taps_that_a_layer_kept_are_counted_all_the_same(backend: str, alone: dict[str, Any]) -> None:
    """A count that depends on what ran before it would compare two networks unfairly."""
    assert alone[backend][1] == alone[backend][0] > 0


@pytest.mark.end_to_end
@pytest.mark.parametrize("backend", ["fft", "dft", "toeplitz", "reference"])
def test_import_alone_makes_torch_count_a_layer_backward(backend: str, alone: dict[str, Any]) -> None:
    # 6 signals and 2 kernels. Forward: x, y, taps. Backward: dy, dx, x, taps and dtaps; three products
    by_fft = (6 + 6 + 2 + 6 + 6 + 6 + 2 + 2) * cost.real_fft(128) + 3 * 6 * 65 * 6
    # 8 blocks of 8: W or W^T for x, y, dy, dx and x again; M for y, dx and dtaps; the taps three times
    by_dft = 2 * (6 * (5 * 2 * 8 * 8 * 8 + 3 * 8 * 16 * 16) + 2 * 3 * (16 * 15 * 15))
    by_matrix = 3 * BACKENDS["toeplitz"].flops(3, 2, 49, 97)
    want = {"fft": by_fft, "dft": by_dft, "toeplitz": by_matrix, "reference": by_matrix}
    assert alone[backend][2] == want[backend] + 2 * KERNEL_FLOPS


@pytest.mark.end_to_end
def test_import_alone_makes_torch_count_a_network(alone: dict[str, Any]) -> None:
    """All that `count` says is executed, but for norms and pooling, which torch counts for nobody."""
    tokens, channels = (256, 64, 16, 4), (8, 16, 24, 32)
    norms = sum(5 * 2 * n * c for n, c in zip(tokens, channels, strict=True))  # of the blocks
    norms += 5 * 2 * (256 * 8 + 256 * 8 + 64 * 16 + 16 * 24 + 32) + 2 * 4 * 32  # stem, downsampling, head; pooling
    counted = count(small_model(), torch.randn(2, 3, 64, 64)).total()
    assert alone["sgconvnext"] == 2 * (counted.executed - norms)


@pytest.mark.end_to_end
def test_import_leaves_the_count_of_convnext_as_it_is(alone: dict[str, Any]) -> None:
    before, after = alone["convnext"]
    assert before == after > 0


@pytest.mark.end_to_end
def test_import_is_cheap(alone: dict[str, Any]) -> None:
    assert alone["imported"] == []


@pytest.mark.parametrize(
    "options",
    [
        *({"backend": backend} | options for backend in BACKENDS_HERE for options in ({}, {"bidirectional": False})),
        *({"dilation": 3}, {"num_scales": 2}, {"num_scales": 7}),
    ],
    ids=str,
)
def test_count_of_a_layer_is_what_runs(options: dict[str, Any]) -> None:
    layer = sgconvnext.SGConv2d(3, (6, 5), **options)
    for size in ((6, 5), (9, 4)):  # and another than the built one
        x = torch.randn(2, 3, *size)
        assert 2 * count(layer, x).total().executed == flops(layer, x) > 0


@pytest.mark.parametrize("bidirectional", [False, True])
def test_count_of_a_signal_layer_is_what_runs(bidirectional: bool) -> None:
    layer = sgconvnext.SGConv(3, 50, scale_dim=8, bidirectional=bidirectional, backend="fft")
    for length in (50, 20):
        x = torch.randn(2, 3, length)
        assert 2 * count(layer, x).total().executed == flops(layer, x) > 0


@pytest.mark.parametrize("options", [{}, GATED], ids=["plain", "gated"])
def test_fixed_network_is_counted_whole(options: dict[str, Any]) -> None:
    """Its gates and MLPs would run oneDNN's operators, and its taps are transformed: a counter sees neither."""
    model = reparameterize_model(random_gates(small_model(ls_init_value=0.5, **options)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        model(x)
    assert any(block in _KEPT for stage in model.stages for block in stage.blocks)
    fresh = small_model(**options)
    kernels = count(fresh, x).total(part=KERNEL).executed
    assert flops(model, x) == flops(fresh, x) - 2 * kernels
    with torch.no_grad(), FlopCounterMode(display=False):
        assert torch.allclose(model(x), want, atol=1e-5)


# where two packages keep their count on a module, and what they are given
RULES = {"total_ops": THOP, "__flops__": PTFLOPS}


@pytest.mark.parametrize("options", [{}, GAP, GATED], ids=["plain", "gap3", "gated"])
@pytest.mark.parametrize("attribute", RULES)
def test_rules_tell_other_counters_what_a_layer_costs(attribute: str, options: dict[str, Any]) -> None:
    rules: Any = RULES[attribute]
    model, x = small_model(**options), torch.randn(2, 3, 64, 64)
    layers = [module for module in model.modules() if type(module) in rules]
    for layer in layers:
        start = torch.zeros(1, dtype=torch.float64) if attribute == "total_ops" else 0
        setattr(layer, attribute, start)
        layer.register_forward_hook(rules[type(layer)])
    with torch.no_grad():
        model(x)
    told = sum(float(getattr(layer, attribute)) for layer in layers)
    counted = count(small_model(**options), x)
    want = counted.total(part=CONVOLUTION).macs + counted.total(part=KERNEL).macs
    assert told == pytest.approx(want, abs=len(layers))  # MACs are whole numbers there
    assert len(layers) == 4  # the product of a gate is in an nn.Linear, which the counters know
