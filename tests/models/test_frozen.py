"""Taps that are kept: in evaluation, where they must never be stale, and for good, by reparameterize."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import refused, relative_error, small_model
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from sgconvnext import SGConv, SGConv2d
from sgconvnext.models import layer

scripting = pytest.mark.filterwarnings("ignore:.*torch.jit:Warning", "ignore:.*torch.jit.*:DeprecationWarning")


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def rebuilt(module: nn.Module, x: Tensor) -> Tensor:
    """The output with taps made anew, as where gradients are asked for."""
    with torch.enable_grad():
        return module(x).detach()


@torch.no_grad()
def kept(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y


def step(module: nn.Module) -> None:
    module(images(2, 6, 8, 8)).sum().backward()
    torch.optim.AdamW(module.parameters(), lr=0.1).step()


def average(module: nn.Module) -> None:
    other = copy.deepcopy(module)
    nn.init.normal_(other.weight)
    torch._foreach_lerp_(list(module.state_dict().values()), list(other.state_dict().values()), 0.5)


def other_state() -> dict[str, Tensor]:
    return SGConv2d(6, 8).state_dict()


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda m: nn.init.normal_(m.weight),
    "through data": lambda m: m.weight.data.mul_(-2.0),
    "data replaced": lambda m: setattr(m.skip, "data", torch.randn(6)),
    "through numpy": lambda m: m.skip.detach().numpy().fill(3.0),
    "norm": lambda m: m.kernel_norm.mul_(2.0),
    "one element": lambda m: m.weight.data[1, 2, 3].add_(1.0),
    "parameter replaced": lambda m: setattr(m, "weight", nn.Parameter(torch.randn_like(m.weight))),
    "optimiser": step,
    "average": average,
    "loaded": lambda m: m.load_state_dict(other_state()),
    "loaded by assignment": lambda m: m.load_state_dict(other_state(), assign=True),
    "initialised": lambda m: m.reset_parameters(),
    "rebuilt and back": lambda m: (m.set_input_size(12), m.set_input_size(8), nn.init.normal_(m.weight)),
    "decay": lambda m: setattr(m, "alpha", (0.9, 0.9)),
    "kind of decay": lambda m: setattr(m, "decay", "position"),
    "through float64": lambda m: (m.double(), m.weight.data.neg_(), m.float()),
    "trained in between": lambda m: (m.train(), step(m), m.eval()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_kept_taps_are_never_stale(change: Callable[[Any], object]) -> None:
    module, x = SGConv2d(6, 8).eval(), images(2, 6, 8, 8)
    before = kept(module, x)
    assert relative_error(before, rebuilt(module, x)) <= 1e-6
    change(module)
    after = kept(module, x)
    assert relative_error(after, rebuilt(module, x)) <= 1e-6
    assert relative_error(after, before) > 1e-3


@pytest.mark.parametrize("name", ["exponent", "backend"])
def test_kept_taps_follow_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = SGConv2d(6, 8, decay="position", backend="fft").eval(), images(2, 6, 8, 8)
    kept(module, x)
    first = module._frozen
    setattr(module, name, {"exponent": 3.0, "backend": "toeplitz"}[name])
    assert relative_error(kept(module, x), rebuilt(module, x)) <= 1e-6
    assert module._frozen is not first


def test_kept_taps_follow_size_batch_and_dtype() -> None:
    module = SGConv2d(6, 8).eval()
    for shape in [(2, 6, 8, 8), (2, 6, 5, 9), (1, 6, 8, 8), (2, 6, 8, 8), (2, 6, 9, 5)]:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = images(*shape).to(dtype)
            y = kept(module, x)
            assert y.dtype == dtype
            assert relative_error(y, rebuilt(module, x)) <= (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("length", [1, 8, 11, 16])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_kept_taps_of_a_signal_are_those_that_it_reaches(bidirectional: bool, length: int) -> None:
    module, x = SGConv(6, 16, scale_dim=4, bidirectional=bidirectional).eval(), images(2, 6, length)
    want = rebuilt(module, x)
    for frozen in (False, True):
        if frozen:
            module.reparameterize()
        assert relative_error(kept(module, x), want) <= 1e-6


def test_taps_are_made_once_in_evaluation_and_anew_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    generate = layer.multiscale_kernel
    monkeypatch.setattr(layer, "multiscale_kernel", lambda *a: made.append(1) or generate(*a))
    module, x = SGConv2d(6, 8), images(2, 6, 8, 8)
    made.clear()
    for _ in range(3):
        kept(module.eval(), x)
    assert len(made) == 1
    copied = copy.deepcopy(module)
    assert copied._frozen is None
    for _ in range(3):
        kept(module.train(), x)
        rebuilt(module.eval(), x)
    assert len(made) == 7


def test_gradients_flow_in_evaluation_after_taps_were_kept() -> None:
    module, x = SGConv2d(6, 8).eval(), images(2, 6, 8, 8)
    with torch.inference_mode():
        module(x)
    module(x).square().sum().backward()
    assert float(module.weight.grad.norm()) > 0
    assert float(module.skip.grad.norm()) > 0


@pytest.mark.parametrize("backend", ["auto", "fft", "toeplitz", "dft", "reference"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": False}, {"dilation": 2}, {"decay": "position"}], ids=str)
def test_reparameterized_layer_gives_the_same_at_every_size(options: dict[str, Any], backend: str) -> None:
    module = SGConv2d(6, 8, backend=backend, **options).eval()
    inputs = [images(2, 6, *size) for size in [(8, 8), (16, 16), (5, 9)]]
    want = [rebuilt(module, x) for x in inputs]
    module.reparameterize()
    module.reparameterize()  # once more does nothing
    assert {name for name, _ in module.named_parameters()} == set()
    assert set(module.state_dict()) == {"taps"}
    for x, y in zip(inputs, want, strict=True):
        assert relative_error(kept(module, x), y) <= 1e-6
        assert relative_error(rebuilt(module, x), y) <= 1e-6


def test_timm_finds_every_layer_and_the_model_gives_the_same() -> None:
    model, x = small_model(), images(2, 3, 64, 64)
    frozen = reparameterize_model(model)
    assert relative_error(kept(frozen, x), kept(model, x)) <= 1e-6
    assert sum(p.numel() for p in frozen.parameters()) == sum(
        p.numel() for name, p in model.named_parameters() if "sgconv" not in name
    )
    assert "reparameterized" in str(frozen.stages[0].blocks[0].sgconv)
    gradient = torch.autograd.grad(frozen(x.requires_grad_()).sum(), x)[0]  # as for a receptive field
    assert relative_error(gradient, torch.autograd.grad(model(x).sum(), x)[0]) <= 1e-5


def test_taps_of_a_reparameterized_layer_are_not_stale_either() -> None:
    module, x = SGConv2d(6, 8).eval(), images(2, 6, 8, 8)
    module.reparameterize()
    kept(module, x)
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
        before = kept(module, x)
        change()
        assert relative_error(kept(module, x), rebuilt(module, x)) <= 1e-6
        assert relative_error(kept(module, x), before) > 1e-3


def test_kept_taps_follow_a_map_turned_on_its_side() -> None:
    module, x = SGConv2d(4, (4, 6)).eval(), images(2, 4, 4, 6)
    before = kept(module, x)
    module.set_input_size((6, 4))
    assert relative_error(kept(module, x), rebuilt(module, x)) <= 1e-6
    assert relative_error(kept(module, x), before) > 1e-3


def test_reparameterized_layer_refuses_what_needs_parameters() -> None:
    module, x = SGConv2d(6, 8), images(2, 6, 8, 8)
    module.reparameterize()
    for refusal, call in {
        "train": module.train,
        "be initialised": module.reset_parameters,
        "be rebuilt": lambda: module.set_input_size(12),
        "give its kernel": module.kernel,
    }.items():
        with refused("SGConv2d", "reparameterized", refusal, "load the trained weights"):
            call()
    assert not module.eval().training
    assert kept(module, x).shape == x.shape
    model = reparameterize_model(small_model())
    with refused("reparameterized", "train"):
        model.train()
    assert not any(module.training for module in model.modules())


def test_state_dict_says_what_is_reparameterized(tmp_path: Path) -> None:
    model, x = small_model(), images(2, 3, 64, 64)
    frozen = reparameterize_model(model)
    torch.save(frozen.state_dict(), tmp_path / "frozen.pth")
    state = torch.load(tmp_path / "frozen.pth", weights_only=True)
    again = reparameterize_model(small_model())
    again.load_state_dict(state)
    assert relative_error(kept(again, x), kept(model, x)) <= 1e-6
    message = r"stages.0.blocks.0.sgconv: the state dict is reparameterized, .*reparameterize_model\(model"
    with pytest.raises(RuntimeError, match=message):
        small_model().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"the layer is reparameterized, .*load it into a new model"):
        again.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        again.load_state_dict(reparameterize_model(small_model(img_size=96)).state_dict())


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 exports no transform of an open batch")
def test_model_can_be_exported_with_any_batch() -> None:
    model = small_model().eval()
    for each in (model, reparameterize_model(model)):
        with torch.no_grad():
            batch = {"x": {0: torch.export.Dim("batch")}}
            exported = torch.export.export(each, (images(2, 3, 64, 64),), dynamic_shapes=batch).module()
            for size in (2, 5):
                x = images(size, 3, 64, 64)
                assert relative_error(exported(x), each(x)) <= 2e-6


@scripting
def test_reparameterized_model_can_be_exported_compiled_scripted_and_copied() -> None:
    model = reparameterize_model(small_model(backend="fft"))
    x = images(2, 3, 64, 64)
    want = kept(model, x)
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
    want = kept(model, x)
    half = reparameterize_model(model).to(dtype)
    assert relative_error(kept(half, x.to(dtype)), want) <= 0.1


def test_registered_model_is_reparameterized_by_name() -> None:
    model = reparameterize_model(timm.create_model("sgconvnext_atto", img_size=32))
    assert sum(isinstance(module, SGConv2d) and module.taps is not None for module in model.modules()) == 12


def test_layers_that_infer_can_be_mapped_over_their_parameters() -> None:
    """As an ensemble; what was mapped must not be kept."""
    layers, x = [SGConv2d(6, 8).eval() for _ in range(3)], images(2, 6, 8, 8)
    base = copy.deepcopy(layers[0])
    stacked = torch.func.stack_module_state(layers)

    def run(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    want = torch.stack([kept(layer, x) for layer in layers])
    for _ in range(2):
        with torch.no_grad():
            assert relative_error(torch.vmap(run)(*stacked), want) <= 1e-6
        assert relative_error(kept(base, x), want[0]) <= 1e-6


def test_transforms_differentiate_a_layer() -> None:
    layer, x = SGConv2d(6, 8), images(2, 6, 8, 8)
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
