"""Layers that `reparameterize` gave fixed taps: the same outputs, no parameters, and nothing kept that is stale."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import GAP, GATED, random_gates, refused, relative_error, small_model
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from sgconvnext import SGConv, SGConv2d
from sgconvnext.longconv import freeze
from sgconvnext.models import convolution
from sgconvnext.models.kept import _KEPT, forget

scripting = pytest.mark.filterwarnings("ignore:.*torch.jit:Warning", "ignore:.*torch.jit.*:DeprecationWarning")


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def rebuilt(module: nn.Module, x: Tensor) -> Tensor:
    """The output of a forward that keeps nothing, as where gradients are asked for."""
    with torch.enable_grad():
        return module(x).detach()


@torch.no_grad()
def inferred(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y


def fixed(module: Any) -> Any:
    module.reparameterize()
    return module


@pytest.mark.parametrize("write", [lambda m: m.weight.data.mul_(-2.0), lambda m: m.skip.detach().numpy().fill(3.0)])
def test_evaluation_follows_parameters_however_they_are_written(write: Callable[[Any], object]) -> None:
    module, x = SGConv2d(6, 8).eval(), images(2, 6, 8, 8)
    before = inferred(module, x)
    assert module in _KEPT
    write(module)
    assert relative_error(inferred(module, x), rebuilt(module, x)) <= 1e-6
    assert relative_error(inferred(module, x), before) > 1e-3
    rebuilt(module, x)
    assert module not in _KEPT  # a step of an optimiser may follow


def test_evaluation_follows_input_size_and_options() -> None:
    module, x = SGConv2d(3, (4, 8)).eval(), images(2, 3, 4, 8)
    inferred(module, x)
    module.set_input_size((8, 4))  # the weights stay the same
    assert relative_error(inferred(module, x), rebuilt(module, x)) <= 1e-6
    inferred(module, x)
    module.options = module.options._replace(alpha=(1.0, 0.3))
    assert relative_error(inferred(module, x), rebuilt(module, x)) <= 1e-6


def test_nothing_is_kept_of_parameters_that_were_written_to_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = SGConv2d(6, 8).eval(), images(2, 6, 8, 8)
    raw = module.weight.detach().clone()

    def written_to(size: tuple[int, int]) -> Tensor:
        module.weight.data.normal_()
        return SGConv2d._taps_for(module, size)

    monkeypatch.setattr(module, "_taps_for", written_to)
    inferred(module, x)
    monkeypatch.undo()
    module.weight.data.copy_(raw)
    assert relative_error(inferred(module, x), rebuilt(module, x)) <= 1e-6


def test_only_small_taps_of_a_layer_with_parameters_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = SGConv2d(6, 8).eval(), images(2, 6, 8, 8)
    monkeypatch.setattr(convolution, "KEPT_BYTES", 8 * 6 * 64 - 1)
    inferred(module, x)
    assert module not in _KEPT
    inferred(module, images(2, 6, 8, 7))
    assert module in _KEPT
    forget(module)
    inferred(fixed(module), x)
    assert module in _KEPT


def test_kept_convolution_follows_size_batch_dtype_and_backend() -> None:
    module = fixed(SGConv2d(6, 8, backend="fft").eval())
    for shape in [(2, 6, 8, 8), (2, 6, 5, 9), (1, 6, 8, 8), (2, 6, 8, 8), (2, 6, 9, 5)]:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = images(*shape).to(dtype)
            y = inferred(module, x)
            assert y.dtype == dtype
            assert relative_error(y, rebuilt(module, x)) <= (1e-2 if dtype == torch.bfloat16 else 1e-6)
    first = _KEPT[module]
    module.backend = "toeplitz"
    assert relative_error(inferred(module, x), rebuilt(module, x)) <= 1e-2
    assert _KEPT[module] is not first


@pytest.mark.parametrize("reparameterized", [True, False])
def test_taps_are_prepared_once(reparameterized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(convolution, "freeze", lambda *a: made.append(1) or freeze(*a))
    module, x = SGConv2d(6, 8).eval(), images(2, 6, 8, 8)
    module = fixed(module) if reparameterized else module
    for _ in range(3):
        inferred(module, x)
        if reparameterized:
            rebuilt(module, x)
    assert len(made) == 1
    copied = copy.deepcopy(module)
    assert copied not in _KEPT
    inferred(copied, x)
    assert len(made) == 2
    forget(module)
    inferred(module, x)
    assert len(made) == 3


@pytest.mark.parametrize("length", [1, 8, 11, 16])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_taps_of_a_signal_are_those_that_it_reaches(bidirectional: bool, length: int) -> None:
    module, x = SGConv(6, 16, scale_dim=4, bidirectional=bidirectional).eval(), images(2, 6, length)
    want = rebuilt(module, x)
    for reparameterized in (False, True):
        if reparameterized:
            module.reparameterize()
        assert relative_error(inferred(module, x), want) <= 1e-6


@pytest.mark.parametrize("backend", ["auto", "fft", "toeplitz", "dft", "reference"])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": False}, {"dilation": 2}, {"decay": "position"}, {"row_gap": 3}], ids=str
)
def test_reparameterized_layer_gives_the_same_at_every_size(options: dict[str, Any], backend: str) -> None:
    module = SGConv2d(6, 8, backend=backend, **options).eval()
    inputs = [images(2, 6, *size) for size in [(8, 8), (16, 16), (5, 9)]]
    want = [rebuilt(module, x) for x in inputs]
    module.reparameterize()
    module.reparameterize()  # once more does nothing
    assert {name for name, _ in module.named_parameters()} == set()
    assert set(module.state_dict()) == {"taps"}
    for x, y in zip(inputs, want, strict=True):
        assert relative_error(inferred(module, x), y) <= 1e-6
        assert relative_error(rebuilt(module, x), y) <= 1e-6


@pytest.mark.parametrize("options", [{}, GAP], ids=str)
def test_timm_finds_every_layer_and_the_model_gives_the_same(options: dict[str, Any]) -> None:
    model, x = small_model(**options), images(2, 3, 64, 64)
    fixed_model = reparameterize_model(model)
    assert relative_error(inferred(fixed_model, x), inferred(model, x)) <= 1e-6
    assert sum(p.numel() for p in fixed_model.parameters()) == sum(
        p.numel() for name, p in model.named_parameters() if "sgconv" not in name or name.endswith("sgconv.bias")
    )
    assert "reparameterized" in str(fixed_model.stages[0].blocks[0].sgconv)
    gradient = torch.autograd.grad(fixed_model(x.requires_grad_()).sum(), x)[0]  # as for a receptive field
    assert relative_error(gradient, torch.autograd.grad(model(x).sum(), x)[0]) <= 1e-5


def test_taps_of_a_reparameterized_layer_are_never_stale() -> None:
    module, x = SGConv2d(6, 8).eval(), images(2, 6, 8, 8)
    module.reparameterize()
    inferred(module, x)
    other = SGConv2d(6, 8)
    other.reparameterize()
    changes: list[Callable[[], object]] = [
        lambda: module.taps.mul_(2.0),
        lambda: module.load_state_dict(other.state_dict()),
        lambda: module.load_state_dict({"taps": torch.randn(6, 127)}, assign=True),
        lambda: (module.double(), module.taps.mul_(-1.0), module.float()),
        lambda: setattr(module.taps, "data", torch.randn(6, 127)),
    ]
    for change in changes:
        before = inferred(module, x)
        change()
        assert relative_error(inferred(module, x), rebuilt(module, x)) <= 1e-6
        assert relative_error(inferred(module, x), before) > 1e-3


def test_reparameterized_layer_refuses_what_needs_parameters() -> None:
    module, x = SGConv2d(6, 8), images(2, 6, 8, 8)
    module.reparameterize()
    for refusal, call in {
        "be initialised": module.reset_parameters,
        "be rebuilt": lambda: module.set_input_size(12),
        "give its kernel": module.kernel,
    }.items():
        with refused("SGConv2d", "reparameterized", refusal, "load the trained weights"):
            call()
    assert not module.train().training
    assert inferred(module, x).shape == x.shape


def test_reparameterized_model_refuses_to_train() -> None:
    model = reparameterize_model(small_model())
    with refused("SGConvNeXt", "reparameterized", "load the trained weights", "requires_grad_(False)"):
        model.train()
    assert not any(module.training for module in model.modules())


def test_frozen_reparameterized_model_is_a_teacher_of_what_trains() -> None:
    class Distillation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = small_model(), reparameterize_model(small_model(drop_path_rate=0.9))
            self.teacher.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.student(x) - self.teacher(x)).square().mean()

    both, x = Distillation().train(), images(2, 3, 64, 64)
    assert both.student.training
    assert not any(module.training for module in both.teacher.modules())
    assert torch.equal(both.teacher(x), both.teacher(x))
    optimizer = torch.optim.AdamW([p for p in both.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        losses.append(loss := both.train()(x))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("options", [{}, GAP], ids=str)
def test_state_dict_says_what_is_reparameterized(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = small_model(**options), images(2, 3, 64, 64)
    fixed_model = reparameterize_model(model)
    torch.save(fixed_model.state_dict(), tmp_path / "fixed_model.pth")
    state = torch.load(tmp_path / "fixed_model.pth", weights_only=True)
    again = reparameterize_model(small_model(**options))
    again.load_state_dict(state)
    assert relative_error(inferred(again, x), inferred(model, x)) <= 1e-6
    message = r"stages.0.blocks.0.sgconv: the state dict is reparameterized, .*reparameterize_model\(model"
    with pytest.raises(RuntimeError, match=message):
        small_model(**options).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"the layer is reparameterized, .*load it into a new model"):
        again.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        again.load_state_dict(reparameterize_model(small_model(img_size=96, **options)).state_dict())


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 exports no transform of an open batch")
@pytest.mark.end_to_end
@pytest.mark.parametrize("options", [{}, GAP], ids=str)
def test_model_can_be_exported_with_any_batch(options: dict[str, Any]) -> None:
    model = small_model(**options).eval()
    for each in (model, reparameterize_model(model)):
        with torch.no_grad():
            batch = {"x": {0: torch.export.Dim("batch")}}
            exported = torch.export.export(each, (images(2, 3, 64, 64),), dynamic_shapes=batch).module()
            for size in (2, 5):
                x = images(size, 3, 64, 64)
                assert relative_error(exported(x), each(x)) <= 2e-6


@scripting
@pytest.mark.parametrize("options", [{}, pytest.param(GATED, marks=pytest.mark.end_to_end)], ids=["plain", "gated"])
def test_reparameterized_model_can_be_exported_compiled_scripted_and_copied(options: dict[str, Any]) -> None:
    model = reparameterize_model(random_gates(small_model(backend="fft", **options)))
    x = images(2, 3, 64, 64)
    want = inferred(model, x)
    with torch.no_grad():
        others = [
            torch.export.export(model, (x,)).module(),
            torch.compile(model, fullgraph=True, backend="aot_eager"),
            torch.jit.script(model),
            copy.deepcopy(model),
        ]
        for other in others:
            assert relative_error(other(x), want) <= 2e-6


def test_step_of_a_reparameterized_layer_generates_the_same() -> None:
    module = SGConv(3, 16, scale_dim=4).eval()
    x = images(2, 3, 5)
    want = rebuilt(module, x)
    module.reparameterize()
    past = None
    for t in range(5):
        y, past = module.step(x[..., t], past)
        assert relative_error(y, want[..., t]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reparameterized_model_in_half_precision(dtype: torch.dtype) -> None:
    model, x = small_model(), images(2, 3, 64, 64)
    want = inferred(model, x)
    half = reparameterize_model(model).to(dtype)
    assert relative_error(inferred(half, x.to(dtype)), want) <= 0.1


def test_registered_model_is_reparameterized_by_name() -> None:
    model = reparameterize_model(timm.create_model("sgconvnext_atto", img_size=32))
    assert sum(isinstance(module, SGConv2d) and module.taps is not None for module in model.modules()) == 12


@pytest.mark.parametrize("options", [{}, GAP], ids=str)
def test_layers_that_infer_can_be_mapped_over_their_parameters(options: dict[str, Any]) -> None:
    """As an ensemble; what was mapped must not be kept."""
    layers, x = [SGConv2d(6, 8, **options).eval() for _ in range(3)], images(2, 6, 8, 8)
    for module in layers:
        nn.init.normal_(module.skip if module.bias is None else module.bias)
    base = copy.deepcopy(layers[0])
    stacked = torch.func.stack_module_state(layers)

    def run(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    want = torch.stack([inferred(layer, x) for layer in layers])
    for _ in range(2):
        with torch.no_grad():
            assert relative_error(torch.vmap(run)(*stacked), want) <= 1e-6
        assert relative_error(inferred(base, x), want[0]) <= 1e-6


@pytest.mark.parametrize("options", [{}, GAP], ids=str)
def test_transforms_differentiate_a_layer(options: dict[str, Any]) -> None:
    layer, x = SGConv2d(6, 8, **options), images(2, 6, 8, 8)
    parameters = dict(layer.named_parameters())

    def loss(parameters: Any) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, parameters, (x,))
        return y.square().sum()

    want = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    for got, exact in zip(torch.func.grad(loss)(parameters).values(), want, strict=True):
        assert relative_error(got, exact) <= 1e-5


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # timm's pooling
def test_models_that_infer_can_be_mapped() -> None:
    """By torch.vmap, for which taps that are kept are a constant."""
    x = images(3, 2, 3, 64, 64)
    for model in (small_model(), reparameterize_model(small_model())):
        with torch.no_grad():
            assert relative_error(torch.vmap(model)(x), model(x.flatten(0, 1)).unflatten(0, (3, 2))) <= 1e-6
