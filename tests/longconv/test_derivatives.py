"""Derivatives of any order, in both modes and under torch.func: every backend against finite differences and the
definition, layers and networks against themselves with the definition inside."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS_HERE, case, relative_error, small_model
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from sgconvnext import SGConv, SGConv2d
from sgconvnext.longconv import long_conv, reference
from sgconvnext.models import generator

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of a fallback in torch.vmap

FAST = [name for name in BACKENDS_HERE if name != "reference"]
LENGTH = 5

each_backend = pytest.mark.parametrize("backend", BACKENDS_HERE)
each_fast_backend = pytest.mark.parametrize("backend", FAST)
each_side = pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])


def signals(causal: bool, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """x (3, 2, L) and taps in float64 that require gradients."""
    x, taps, _, _ = case(length, causal, torch.float64)
    return x.clone().requires_grad_(), taps.clone().requires_grad_()


def cube(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A number whose derivatives of the first three orders are all there, mixed ones too."""
    return lambda x, taps: long_conv(x, taps, backend).pow(3).sum()


def flat(tree: Any) -> Tensor:
    """Every number of nested tuples, to be compared at once."""
    return torch.cat([part.flatten() for part in torch.utils._pytree.tree_leaves(tree)])


# The operator


@each_side
@each_backend
def test_second_derivatives_match_finite_differences(backend: str, causal: bool) -> None:
    inputs = signals(causal)
    function = lambda x, taps: long_conv(x, taps, backend)  # noqa: E731
    everything = {"check_batched_grad": True, "check_undefined_grad": True}
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_forward_grad=True, **everything
    )
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, **everything)


@each_fast_backend
def test_third_derivatives_match_finite_differences(backend: str) -> None:
    inputs = signals(True, 3)

    def gradients(x: Tensor, taps: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(cube(backend)(x, taps), [x, taps], create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, inputs)


@each_side
@pytest.mark.parametrize("length", [1, 97])
@each_fast_backend
def test_hessian_vector_products_are_those_of_the_definition(backend: str, length: int, causal: bool) -> None:
    def product(backend: str) -> list[Tensor]:
        inputs = signals(causal, length)
        first = torch.autograd.grad(cube(backend)(*inputs), inputs, create_graph=True)
        along = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in first]
        return list(torch.autograd.grad(first, inputs, along))

    for got, want in zip(product(backend), product("reference"), strict=True):
        assert want.abs().max() > 0
        assert relative_error(got, want) <= 1e-12


NESTED: dict[str, Callable[..., Any]] = {
    "grad": lambda f: grad(f, (0, 1)),
    "hessian": lambda f: hessian(f, (0, 1)),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f, (0, 1)), (0, 1)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f, (0, 1)), (0, 1)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f, (0, 1)), (0, 1)),
    "jacfwd of hessian": lambda f: jacfwd(hessian(f, (0, 1)), (0, 1)),
    "vjp": lambda f: lambda *primals: vjp(f, *primals)[1](torch.tensor(3.0, dtype=torch.float64)),
    "jvp of jvp": lambda f: lambda *primals: jvp(lambda *p: jvp(f, p, p)[1], primals, primals)[1],
    "jvp of grad": lambda f: lambda *primals: jvp(grad(f, (0, 1)), primals, primals)[1],
    "vmap over signals": lambda f: lambda x, taps: vmap(grad(f, (0, 1)), (0, None))(x.unsqueeze(1), taps),
    "vmap over taps": lambda f: lambda x, taps: vmap(grad(f, (0, 1)), (None, 0))(x, torch.stack([taps, 2 * taps])),
    "vmap over both": lambda f: (
        lambda x, taps: vmap(grad(f, (0, 1)), (2, 1))(torch.stack([x, 3 * x], 2), torch.stack([taps, 2 * taps], 1))
    ),
    "vmap of vmap": lambda f: (
        lambda x, taps: vmap(lambda t: vmap(lambda s: hessian(f, (0, 1))(s, t))(x[:, None]))(
            torch.stack([taps, 2 * taps])
        )
    ),
}


@pytest.mark.parametrize("nested", NESTED)
@each_fast_backend
def test_transforms_of_torch_func_give_those_of_the_definition(backend: str, nested: str) -> None:
    x, taps = (tensor.detach() for tensor in signals(False))
    got, want = (flat(NESTED[nested](cube(name))(x, taps)) for name in (backend, "reference"))
    assert relative_error(got, want) <= 1e-12


@each_side
@each_fast_backend
def test_batched_gradients_are_those_of_the_definition(backend: str, causal: bool) -> None:
    x, taps = signals(causal)
    many = torch.randn(4, *x.shape, dtype=x.dtype)

    def batched(backend: str) -> Tensor:
        y = long_conv(x, taps, backend)
        return flat(torch.autograd.grad(y, [x, taps], many, is_grads_batched=True))

    assert relative_error(batched(backend), batched("reference")) <= 1e-12


@each_fast_backend
def test_forward_mode_of_a_gradient_taken_before_gives_that_of_the_definition(backend: str) -> None:
    """The convolution runs outside of forward mode, and its backward inside."""
    x, taps = signals(False)

    def tangent(backend: str) -> Tensor:
        y = long_conv(x, taps, backend)
        with torch.autograd.forward_ad.dual_level():
            dy = torch.autograd.forward_ad.make_dual(torch.ones_like(y), x.detach())
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
            return torch.autograd.forward_ad.unpack_dual(dx).tangent

    assert relative_error(tangent(backend), tangent("reference")) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_fast_backend
def test_second_derivatives_are_close_in_every_dtype(backend: str, dtype: torch.dtype) -> None:
    def product(backend: str, dtype: torch.dtype) -> Tensor:
        x, taps, _, _ = case(49, False, torch.float64)
        x, taps = x.to(dtype).requires_grad_(), taps.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        y = long_conv(x, taps / 49, backend)
        first = torch.autograd.grad(y.double().pow(3).sum(), [x, taps], create_graph=True)
        second = torch.autograd.grad(sum(t.double().square().sum() for t in first), [x, taps])
        assert [t.dtype for t in second] == [x.dtype, taps.dtype]
        return flat([t.double() for t in second])

    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert relative_error(product(backend, dtype), product("reference", torch.float64)) <= bound


def test_compiled_operator_has_no_second_derivative_and_says_so() -> None:
    torch.compiler.reset()
    x, taps = signals(False)
    compiled = torch.compile(lambda x, taps: long_conv(x, taps, "toeplitz"), fullgraph=True, backend="aot_eager")
    (dx,) = torch.autograd.grad(compiled(x, taps).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


COMPILED = {
    "grad of grad": lambda f: grad(lambda x: grad(f)(x).square().sum()),
    "vmap of grad": lambda f: lambda x: vmap(grad(lambda one: f(one[None])))(x),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
}


@pytest.mark.parametrize(
    ("backend", "nested"), [("fft", nested) for nested in COMPILED] + [(name, "grad of grad") for name in FAST[1:]]
)
def test_compiled_transforms_give_what_they_give_uncompiled(backend: str, nested: str) -> None:
    torch.compiler.reset()
    x, taps = (tensor.detach() for tensor in signals(False))
    function = COMPILED[nested](lambda x: cube(backend)(x, taps))
    assert relative_error(torch.compile(function, backend="aot_eager")(x), function(x)) <= 1e-12


# Layers


def with_the_definition(model: nn.Module) -> nn.Module:
    """A copy that convolves by the definition."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, SGConv | SGConv2d):
            module.backend = "reference"
    return model


def product_over(model: nn.Module, x: Tensor) -> Tensor:
    """A Hessian-vector product over the input and all parameters."""
    inputs = [x, *model.parameters()]
    first = torch.autograd.grad(model(x).pow(3).sum(), inputs, create_graph=True)
    return flat(torch.autograd.grad(sum((g * (g + 1)).sum() for g in first), inputs))


@pytest.mark.parametrize("bidirectional", [True, False])
@each_fast_backend
def test_hessian_vector_product_over_a_layers_parameters(backend: str, bidirectional: bool) -> None:
    own = SGConv2d(3, (4, 6), bidirectional=bidirectional, backend=backend, dtype=torch.float64)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert relative_error(product_over(own, x), product_over(with_the_definition(own), x)) <= 1e-12


@pytest.mark.parametrize("bidirectional", [True, False])
def test_layer_passes_torchs_checks_of_second_derivatives(bidirectional: bool) -> None:
    own = SGConv(2, 6, scale_dim=2, bidirectional=bidirectional, backend="fft", dtype=torch.float64)
    names = list(dict(own.named_parameters()))
    x = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Any:
        return functional_call(own, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in own.parameters()))
    assert torch.autograd.gradgradcheck(run, inputs, check_fwd_over_rev=True)


def test_layer_in_groups_of_channels_has_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    own = SGConv(5, 40, dtype=torch.float64)
    x = torch.randn(2, 5, 40, dtype=torch.float64, requires_grad=True)
    want = product_over(own, x)
    by_transform = grad(lambda x: own(x).pow(3).sum())(x)
    monkeypatch.setattr(generator, "TAPS_BYTES", 1)
    monkeypatch.setattr(generator, "CHUNK_BYTES", 2 * 4 * 40)
    assert len(own.chunks()) == 3
    assert relative_error(product_over(own, x), want) <= 1e-12
    assert relative_error(grad(lambda x: own(x).pow(3).sum())(x), by_transform) <= 1e-12
    own_jvp, whole_jvp = (jvp(m, (x.detach(),), (x.detach(),))[1] for m in (own, with_the_definition(own)))
    assert relative_error(own_jvp, whole_jvp) <= 1e-12


# Networks


def network(**options: Any) -> nn.Module:
    """Four blocks in float64. Layer scale 0.5, or their errors would not be seen."""
    return small_model(ls_init_value=0.5, **options).double().train()


IMAGES = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", ["auto", *FAST])
def test_hessian_vector_product_over_a_network(backend: str) -> None:
    model, x = network(backend=backend), IMAGES.clone().requires_grad_()
    assert relative_error(product_over(model, x), product_over(with_the_definition(model), x)) <= 1e-6


def test_hessian_vector_product_with_gradient_checkpointing() -> None:
    model, x = network(), IMAGES.clone().requires_grad_()
    want = product_over(model, x)
    assert relative_error(product_over(lambda_of(model), x), want) <= 1e-9


def lambda_of(model: nn.Module) -> nn.Module:
    """The model run by torch's checkpoint, which runs it again in backward."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.model, x, use_reentrant=False)

    return Again()


def critic_step(model: nn.Module, penalty: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """The parameters of a critic after one step of gradient descent on its loss with a penalty on its gradient."""
    real, fake = IMAGES, IMAGES.flip(0) * 0.5
    loss = model(fake).mean() - model(real).mean() + 10 * penalty(model, 0.3 * real + 0.7 * fake)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return flat([-1e-3 * gradient for gradient in gradients])


def wgan_gp(model: nn.Module, x: Tensor) -> Tensor:
    """(||grad D(x)||_2 - 1)^2 (Gulrajani et al., arXiv 1704.00028, Eq. 3)."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def r1(model: nn.Module, x: Tensor) -> Tensor:
    """||grad D(x)||^2 / 2 (Mescheder et al., arXiv 1801.04406, Eq. 9)."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().flatten(1).sum(1).mean() / 2


@pytest.mark.parametrize("penalty", [wgan_gp, r1])
def test_step_with_a_gradient_penalty_is_that_of_the_definition(
    penalty: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    model = network(num_classes=1)
    got, want = critic_step(model, penalty), critic_step(with_the_definition(model), penalty)
    assert relative_error(got, want) <= 1e-6
    without = critic_step(model, lambda model, x: torch.zeros((), dtype=x.dtype))
    assert relative_error(got, without) > 0.1  # the penalty is not lost


def test_network_is_differentiated_by_torch_func() -> None:
    model, exact = network(), with_the_definition(network())
    exact.load_state_dict(model.state_dict())
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def products(model: nn.Module) -> Tensor:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            y: Tensor = functional_call(model, parameters, (IMAGES,))
            return y.pow(3).sum()

        return flat(jvp(grad(loss), (parameters,), (parameters,)))

    assert relative_error(products(model), products(exact)) <= 1e-6


@pytest.mark.parametrize("evaluated", [False, True])
def test_per_sample_gradients_are_those_of_one_sample_at_a_time(evaluated: bool) -> None:
    model = network().train(not evaluated)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = functional_call(model, parameters, (x[None],))
        return y.square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, IMAGES)
    for i, image in enumerate(IMAGES):
        alone = torch.autograd.grad(model(image[None]).square().sum(), list(model.parameters()))
        assert relative_error(flat([value[i] for value in together.values()]), flat(alone)) <= 1e-9


def test_definition_differentiates_as_its_equation() -> None:
    """What the others are compared with: d/dK and d/dx of sum y^3 by hand, for one sample."""
    x, taps = torch.tensor([[[2.0]]], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    y = reference.long_conv(x, taps)
    dx, dtaps = torch.autograd.grad(y.pow(3).sum(), [x, taps], create_graph=True)
    assert (dx.item(), dtaps.item()) == (3 * 36 * 3, 3 * 36 * 2)  # 3 y^2 K and 3 y^2 x
    mixed = torch.autograd.grad(dx.sum(), taps)[0]
    assert mixed.item() == 9 * 36  # d/dK of 3 x^2 K^3
