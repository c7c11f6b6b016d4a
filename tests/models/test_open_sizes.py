"""Exports that leave height and width open run at other sizes, and give there what the network gives.

PyTorch's own layout checks refuse maps of one row or column: at 32 px, of ConvNeXt too, unless they are switched off.
"""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from helpers import GAP, GATED, random_gates, relative_error, small_model
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.export import Dim

pytestmark = [
    pytest.mark.end_to_end,  # half a minute each
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
SIZES = [(64, 96), (64, 64), (32, 32), (96, 160), (160, 32)]  # px; the first one is that of the example
OPEN = {0: Dim("batch", min=1), 2: 32 * Dim("height", min=1, max=64), 3: 32 * Dim("width", min=1, max=64)}


def network(reparameterized: bool, options: dict[str, Any]) -> nn.Module:
    model = random_gates(small_model(ls_init_value=0.5, **options))
    return reparameterize_model(model) if reparameterized else model


def images(batch: int = 2, size: tuple[int, int] = SIZES[0]) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(
    ("reparameterized", "options"),
    [
        (False, {"bidirectional": False}),
        (True, GATED | {"output_stride": 8}),
        (True, {"backend": "fft"}),
        (True, {"backend": "toeplitz"}),
    ],
    ids=str,
)
def test_exported_program_of_open_size_gives_what_the_network_gives(
    reparameterized: bool, options: dict[str, Any]
) -> None:
    model = network(reparameterized, options)
    low = 2 if "output_stride" in options or options.get("backend") == "fft" else 1
    shapes = {0: Dim("batch", min=1), **{i: 32 * Dim(f"side{i}", min=low, max=64) for i in (2, 3)}}
    program = torch.export.export(model, (images(),), dynamic_shapes={"x": shapes}, strict=False)
    guarded, free = program.module(), program.module(check_guards=False)
    for size in (size for size in SIZES if min(size) >= 32 * low):
        x, run = images(3, size), guarded if min(size) > 32 else free
        with torch.no_grad():
            assert relative_error(run(x), model(x)) <= 1e-5, size


def test_onnx_file_of_open_size_gives_what_the_network_gives(tmp_path: Path) -> None:
    """Of a network that is not reparameterized; sgconvnext.formats writes those that are."""
    model, path = network(False, GAP), tmp_path / "model.onnx"
    torch.onnx.export(model, (images(),), path, dynamo=True, verbose=False, dynamic_shapes={"x": OPEN})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        x = images(3, size)
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        with torch.no_grad():
            assert relative_error(got, model(x)) <= 1e-4, size
