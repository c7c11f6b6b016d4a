"""The block's Triton operators: their numbers in Triton's interpreter, and on the meta device all that needs none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import refused
from torch import Tensor

pytest.importorskip("triton", reason="the block's Triton operators need triton")

from sgconvnext.longconv.triton.block import layer_norm_channels_last, scale_residual_channels_first

TESTS = Path(__file__).parents[1]
HALVES = (torch.bfloat16, torch.float16)


def pass_their_cases(part: str, interpret: str) -> None:
    """Triton reads TRITON_INTERPRET when a program is defined, hence another process."""
    command = [sys.executable, "-m", "pytest", "triton_block_cases.py", "-k", part, "--override-ini=addopts=", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=TESTS,
        env=os.environ | {"TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"^(\d+) passed, \d+ deselected in", done.stdout, re.MULTILINE)
    assert told, done.stdout
    assert int(told[1]) > 50


@pytest.mark.parametrize("part", ["test_norm", "not test_norm"])
def test_interpreted_programs_pass_their_cases(part: str) -> None:
    pass_their_cases(part, "1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("part", ["test_norm", "not test_norm"])
def test_compiled_programs_pass_their_cases(part: str) -> None:
    pass_their_cases(part, "0")


def test_package_does_not_import_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import sgconvnext, sgconvnext.profile; "
    code += "assert 'sgconvnext.longconv.triton.block' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [None, torch.float32, *HALVES])
@pytest.mark.parametrize("of_x", [torch.float32, *HALVES])
def test_norm_has_the_shape_and_dtype_that_are_asked_for(of_x: torch.dtype, dtype: torch.dtype | None) -> None:
    x = on_meta(2, 3, 5, dtype=of_x).requires_grad_()
    y = layer_norm_channels_last(x, on_meta(3), on_meta(3), 1e-6, dtype)
    assert y.shape == (2, 5, 3)
    assert y.dtype == (of_x if dtype is None else dtype)
    assert y.is_contiguous()
    (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert (dx.shape, dx.dtype) == (x.shape, of_x)


@pytest.mark.parametrize("of_y", [torch.float32, *HALVES])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_residual_has_the_shape_and_dtype_of_its_shortcut(dtype: torch.dtype, of_y: torch.dtype) -> None:
    y = on_meta(2, 5, 3, dtype=of_y).requires_grad_()
    out = scale_residual_channels_first(on_meta(2, 3, 5, dtype=dtype), y, on_meta(3), on_meta(2))
    assert (out.shape, out.dtype) == ((2, 3, 5), dtype)
    assert out.is_contiguous()
    (dy,) = torch.autograd.grad(out, y, torch.empty_like(out))
    assert (dy.shape, dy.dtype) == (y.shape, of_y)


def test_norm_refuses_what_it_cannot_take() -> None:
    x, vector = on_meta(2, 3, 5), on_meta(3)
    with refused("x is", "(2, 3)", "three dimensions"):
        layer_norm_channels_last(on_meta(2, 3), vector, vector, 1e-6)
    with refused("x is", "torch.float64", "float32, bfloat16, float16"):
        layer_norm_channels_last(on_meta(2, 3, 5, dtype=torch.float64), vector, vector, 1e-6)
    with refused("x is", "(1, 65536, 32768)", "2^31"):
        layer_norm_channels_last(on_meta(1, 65536, 32768), on_meta(65536), on_meta(65536), 1e-6)
    with refused("weight is (5,)", "C=3", "(3,)"):
        layer_norm_channels_last(x, on_meta(5), vector, 1e-6)
    with refused("bias is (3,)", "torch.int64"):
        layer_norm_channels_last(x, vector, on_meta(3, dtype=torch.int64), 1e-6)
    with refused("dtype=torch.float64", "float32, bfloat16, float16"):
        layer_norm_channels_last(x, vector, vector, 1e-6, torch.float64)


def test_residual_refuses_what_it_cannot_take() -> None:
    shortcut, y = on_meta(2, 3, 5), on_meta(2, 5, 3)
    with refused("shortcut is", "(2, 3, 5, 1)"):
        scale_residual_channels_first(on_meta(2, 3, 5, 1), y)
    with refused("y is (2, 3, 5)", "(2, 5, 3)"):
        scale_residual_channels_first(shortcut, on_meta(2, 3, 5))
    with refused("y is", "torch.int32"):
        scale_residual_channels_first(shortcut, on_meta(2, 5, 3, dtype=torch.int32))
    with refused("gamma is (5,)", "C=3", "(3,)"):
        scale_residual_channels_first(shortcut, y, on_meta(5))
    with refused("keep is (2, 1)", "B=2", "(2,)"):
        scale_residual_channels_first(shortcut, y, None, on_meta(2, 1))
    with refused("keep requires a gradient", "detach"):
        scale_residual_channels_first(shortcut, y, None, on_meta(2).requires_grad_())
