"""Whatever records a network records the right one: ONNX by both exporters, TorchScript, FX, make_fx.

Layer scale is 0.5: at its initial 1e-6 a file without any convolution would pass.
"""

import io
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from helpers import BACKENDS_HERE, GAP, GATED, mixers, random_gates, refused, relative_error, small_model
from timm.utils import reparameterize_model
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor

from sgconvnext import SGConv, SGConv2d

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)
each_form = pytest.mark.parametrize("reparameterized", [False, True], ids=["plain", "reparameterized"])
each_backend = pytest.mark.parametrize("backend", ["auto", *BACKENDS_HERE])


def network(reparameterized: bool = False, **options: Any) -> nn.Module:
    model = random_gates(small_model(ls_init_value=0.5, **options))
    return reparameterize_model(model) if reparameterized else model


def images(batch: int = 2, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def export(model: nn.Module, x: Tensor, path: Path, dynamo: bool, dynamic: bool, opset: int | None = None) -> None:
    if dynamo:
        shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if dynamic else {}
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, opset_version=opset, **shapes)
        return
    axes = {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}} if dynamic else {}
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(model, (x,), path, dynamo=False, opset_version=opset or 17, **names, **axes)


def by_onnxruntime(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


# ONNX


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@each_form
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.end_to_end)], ids=["legacy", "dynamo"])
def test_onnx_file_gives_what_the_network_gives(
    dynamo: bool, reparameterized: bool, dynamic: bool, tmp_path: Path
) -> None:
    model = network(reparameterized)
    export(model, images(), tmp_path / "model.onnx", dynamo, dynamic)
    for x in [images(), images(5), images(1)] if dynamic else [images()]:
        with torch.no_grad():
            assert relative_error(by_onnxruntime(tmp_path / "model.onnx", x), model(x)) <= 1e-5


@pytest.mark.end_to_end
@each_form
@pytest.mark.parametrize("opset", [17, 18, 19, 20])
def test_every_opset_of_the_legacy_exporter_has_the_convolution(
    opset: int, reparameterized: bool, tmp_path: Path
) -> None:
    """Two networks that differ in their kernels alone must differ in their files as they do themselves."""
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = network()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "sgconv" not in name:
                nn.init.normal_(parameter, std=0.1)
        model = reparameterize_model(model) if reparameterized else model
        export(model, images(), tmp_path / "model.onnx", dynamo=False, dynamic=False, opset=opset)
        outputs.append(by_onnxruntime(tmp_path / "model.onnx", images()))
        with torch.no_grad():
            assert relative_error(outputs[-1], model(images())) <= 1e-5
    assert relative_error(*outputs) > 1e-2


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (96, 64)),
        (GAP, (96, 64)),
        (GATED, (96, 64)),
        *(
            pytest.param(*case, marks=pytest.mark.end_to_end)
            for case in [
                ({"bidirectional": False}, (64, 96)),
                ({"decay": "position"}, (64, 64)),
                ({"alpha": (0.9, 0.3)}, (64, 64)),
                ({"output_stride": 8}, (64, 64)),
                ({"num_scales": 1}, (64, 64)),
                ({"img_size": 32}, (32, 32)),
                ({"img_size": 160}, (160, 160)),
                *(({"backend": name}, (64, 64)) for name in BACKENDS_HERE if name != "fft"),
            ]
        ),
    ],
    ids=str,
)
@each_form
def test_legacy_onnx_file_of_any_options_and_size(
    options: dict[str, Any], size: tuple[int, int], reparameterized: bool, tmp_path: Path
) -> None:
    model, x = network(reparameterized, **options), images(2, size)
    export(model, x, tmp_path / "model.onnx", dynamo=False, dynamic=True)
    for batch in (x, images(3, size)):
        with torch.no_grad():
            assert relative_error(by_onnxruntime(tmp_path / "model.onnx", batch), model(batch)) <= 1e-5


def test_legacy_onnx_of_an_fft_is_refused(tmp_path: Path) -> None:
    with refused("backend 'fft'", "dynamo=False", "backend='auto'", "dynamo=True"):
        export(network(backend="fft"), images(), tmp_path / "model.onnx", dynamo=False, dynamic=False)


def test_onnx_file_of_another_size_is_refused_by_the_runtime(tmp_path: Path) -> None:
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(network(), (images(),), tmp_path / "model.onnx", dynamo=False, dynamic_axes=axes, **names)
    for size in [(96, 96), (32, 32), (32, 128)]:
        with pytest.raises(Exception, match=r"(?i)dimension|shape|expand"):
            by_onnxruntime(tmp_path / "model.onnx", images(2, size))


# TorchScript


@each_form
@pytest.mark.parametrize(
    "backend", ["auto", *(pytest.param(name, marks=pytest.mark.end_to_end) for name in BACKENDS_HERE)]
)
def test_saved_trace_gives_what_the_network_gives(backend: str, reparameterized: bool) -> None:
    model = network(reparameterized, backend=backend)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, images()), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for x in (images(), images(5)):
        with torch.no_grad():
            assert relative_error(traced(x), model(x)) <= 1e-6


@pytest.mark.parametrize("size", [(96, 96), (32, 128)], ids=str)
@each_form
def test_trace_fails_at_another_size_than_its_own(reparameterized: bool, size: tuple[int, int]) -> None:
    traced = torch.jit.trace(network(reparameterized), images())
    with pytest.raises(RuntimeError, match="expanded size"):
        traced(images(2, size))


def test_trace_that_runs_under_autocast_keeps_the_dtype() -> None:
    layer, x = SGConv2d(3, (4, 6), backend="toeplitz"), torch.randn(2, 3, 4, 6)
    traced = torch.jit.trace(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert traced(x).dtype == layer(x).dtype == torch.float32


@pytest.mark.parametrize("length", [19, 40])
def test_trace_of_a_signal_fails_at_another_length(length: int) -> None:
    layer = SGConv(3, 40)
    x = torch.randn(2, 3, 20)
    traced = torch.jit.trace(layer, x)
    assert relative_error(traced(x), layer(x)) <= 1e-6
    with pytest.raises(RuntimeError, match="expanded size"):
        traced(torch.randn(2, 3, length))


@each_backend
def test_traced_layer_has_the_gradients_of_the_layer(backend: str) -> None:
    layer = SGConv2d(3, (4, 6), backend=backend)
    x, dy = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    traced = torch.jit.trace(layer, x)
    want = torch.autograd.grad(layer(x), list(layer.parameters()), dy)
    for got, exact in zip(torch.autograd.grad(traced(x), list(traced.parameters()), dy), want, strict=True):
        assert relative_error(got, exact) <= 1e-5


@each_form
@pytest.mark.parametrize("options", [{}, GATED], ids=["plain", "gated"])
def test_scripted_network_can_be_switched_and_optimised(options: dict[str, Any], reparameterized: bool) -> None:
    model, x = network(reparameterized, **options), images(2, (96, 64))
    with torch.no_grad():
        want = model(x)
        scripted = torch.jit.script(model)
        assert not scripted.eval().training
        assert relative_error(scripted(x), want) <= 1e-5
        for form in (torch.jit.freeze(scripted), torch.jit.optimize_for_inference(scripted)):
            assert relative_error(form(x), want) <= 1e-5
        assert torch.jit.script(network()).train().training


# FX


@each_form
@pytest.mark.parametrize(
    "options",
    [{}, GAP, GATED, *(pytest.param({"backend": name}, marks=pytest.mark.end_to_end) for name in BACKENDS_HERE)],
    ids=str,
)
def test_make_fx_records_no_write_and_the_right_operators(options: dict[str, Any], reparameterized: bool) -> None:
    model, x = network(reparameterized, **options), images()
    with torch.no_grad():
        graph = make_fx(model)(x)
    assert not [node for node in graph.graph.nodes if "copy_" in str(node.target)]
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with torch.no_grad():
        assert relative_error(graph(x), model(x)) <= 1e-6


@pytest.mark.parametrize("options", [{}, GAP, GATED], ids=str)
@each_form
def test_symbolic_trace_runs_at_every_size(reparameterized: bool, options: dict[str, Any]) -> None:
    model = network(reparameterized, **options)
    traced = fx.symbolic_trace(model)
    assert len([node for node in traced.graph.nodes if str(node.target).endswith("sgconv")]) == len(mixers(model))
    for x in (images(), images(3, (96, 64))):
        with torch.no_grad():
            assert relative_error(traced(x), model(x)) <= 1e-6
    with refused("31x64"):
        traced(images(1, (31, 64)))


def test_symbolic_trace_of_a_signal_records_its_options() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SGConv(3, 20)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x, return_kernel=True)[1]

    model, x = Model(), torch.randn(2, 3, 20)
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


def test_torchvision_extracts_features() -> None:
    model, x = network(), images(2, (96, 64))
    extractor = create_feature_extractor(model, {"stages.2": "map", "stages.3.blocks.0.sgconv": "mixed"})
    found = extractor(x)
    assert relative_error(found["map"], model.forward_intermediates(x, intermediates_only=True)[2]) <= 1e-6
    below = model.stages[3].downsample(found["map"])
    assert relative_error(found["mixed"], model.stages[3].blocks[0].sgconv(below)) <= 1e-6
