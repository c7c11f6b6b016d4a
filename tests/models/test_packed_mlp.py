"""The MLP with packed weights, as reparameterized blocks run it on CPUs, against the MLP as it is."""

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import GAP, GATED, relative_error
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sgconvnext.models import packed_mlp
from sgconvnext.models.block import SGConvNeXtBlock
from sgconvnext.models.gate import Gate
from sgconvnext.models.kept import _KEPT

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
SHAPE = (2, 16, 6, 7)


def fixed_block(ls_init_value: float | None = 0.5, **options: Any) -> SGConvNeXtBlock:
    """A reparameterized block with random biases, and a random gate if it has one."""
    block = SGConvNeXtBlock(16, SHAPE[2:], ls_init_value=ls_init_value, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    block.sgconv.reparameterize()
    return block.eval()


def branch(block: SGConvNeXtBlock, x: Tensor) -> Tensor:
    with torch.no_grad():
        return block(x) - x


def exact(block: SGConvNeXtBlock, x: Tensor) -> Tensor:
    """The same in float64, which is never packed."""
    return branch(copy.deepcopy(block).double(), x.double())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("ls_init_value", [0.5, 1e-6, None])
@pytest.mark.parametrize("images", [1, 2, 30])
def test_packed_mlp_is_the_mlp(images: int, ls_init_value: float | None, layout: torch.memory_format) -> None:
    block, x = fixed_block(ls_init_value), torch.randn(images, *SHAPE[1:]).to(memory_format=layout)
    block(x)
    assert block not in _KEPT  # gradients are asked for
    if ls_init_value == 1e-6:  # or the sum would hide the branch
        x = x * 1e-6
    y = branch(block, x)
    assert block in _KEPT
    assert relative_error(y, exact(block, x)) <= 2e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", [{}, {"mlp_ratio": 4.0}, {"ls_init_value": None}, {"norm_eps": 0.5}, GAP], ids=str)
@pytest.mark.parametrize("images", [1, 2, 30, 0])  # in one chunk, and in two
def test_packed_gate_is_the_gate(images: int, options: dict[str, Any], layout: torch.memory_format) -> None:
    block, x = fixed_block(**(GATED | options)), torch.randn(images, *SHAPE[1:]).to(memory_format=layout)
    given = x.clone()
    y = branch(block, x)
    assert (block in _KEPT) == (images > 0)
    assert torch.equal(x, given)
    assert y.shape == x.shape
    if images:
        assert relative_error(y, exact(block, x)) <= 2e-6
        nn.init.zeros_(block.gate.linear.weight)
        assert relative_error(branch(block, x), y) > 1e-3


def test_packed_gate_is_freed_when_training_follows() -> None:
    block, x = fixed_block(**GATED), torch.randn(SHAPE)
    branch(block, x)
    assert block in _KEPT
    block(x).sum().backward()
    assert block not in _KEPT
    assert block.gate.linear.weight.grad.any()


@pytest.mark.parametrize("images", [2, 0])
def test_packed_mlp_follows_a_mixer_with_a_gap_and_a_bias(images: int) -> None:
    block, x = fixed_block(**GAP), torch.randn(images, *SHAPE[1:])
    y = branch(block, x)
    assert (block in _KEPT) == (images > 0)
    assert y.shape == x.shape
    assert images == 0 or relative_error(y, exact(block, x)) <= 2e-6


needs_bf16 = pytest.mark.skipif(not packed_mlp._works_in_half(), reason="this CPU has no products in bfloat16")


@needs_bf16
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("ls_init_value", [0.5, 1e-6, None])
@pytest.mark.parametrize("images", [1, 2, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_mlp_of_autocast_is_as_exact_as_the_mlp(
    dtype: torch.dtype, images: int, ls_init_value: float | None, layout: torch.memory_format
) -> None:
    block, x = fixed_block(ls_init_value), torch.randn(images, *SHAPE[1:]).to(dtype).to(memory_format=layout)
    if ls_init_value == 1e-6:
        x = x * 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x).detach()  # with gradients, so not packed
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            packed = block(x)
    assert block in _KEPT
    assert (packed.dtype, packed.shape) == (y.dtype, y.shape)
    want = exact(block, x)
    errors = [relative_error(each.double() - x.double(), want) for each in (packed, y)]
    assert errors[0] <= max(1.2 * errors[1], 8e-3)
    assert errors[0] <= 2e-2
    assert not torch.equal(packed, y)  # its hidden layer is rounded once less


@needs_bf16
def test_packed_weights_follow_the_dtype_of_autocast() -> None:
    block, x = fixed_block(), torch.randn(SHAPE)
    with torch.no_grad():
        block(x)
        assert _KEPT[block].value.hidden[1].dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
        assert _KEPT[block].value.hidden[1].dtype == torch.bfloat16
        nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(block.mlp.fc2.bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(block(x), x)


def test_no_image_is_no_output() -> None:
    assert branch(fixed_block(), torch.randn(0, *SHAPE[1:])).shape == (0, *SHAPE[1:])


def rounded_in_between(block: SGConvNeXtBlock) -> None:
    block.half()
    block.float()


def narrow(block: SGConvNeXtBlock) -> None:
    """Half of the hidden layer, in the same memory."""
    block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight[:32])
    block.mlp.fc1.bias = nn.Parameter(block.mlp.fc1.bias[:32])
    block.mlp.fc2.weight = nn.Parameter(block.mlp.fc2.weight[:, :32])


class NegativeMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


CHANGES: dict[str, Callable[[Any], object]] = {
    "hidden weight": lambda b: nn.init.normal_(b.mlp.fc1.weight),
    "hidden bias": lambda b: nn.init.normal_(b.mlp.fc1.bias),
    "weight": lambda b: nn.init.normal_(b.mlp.fc2.weight),
    "bias": lambda b: nn.init.normal_(b.mlp.fc2.bias),
    "layer scale": lambda b: nn.init.normal_(b.gamma),
    "norm": lambda b: nn.init.normal_(b.norm.weight),
    "data replaced": lambda b: setattr(b.mlp.fc2.weight, "data", torch.randn(16, 64)),
    "parameter replaced": lambda b: setattr(b.mlp.fc1, "weight", nn.Parameter(torch.randn(64, 16))),
    "layer scale taken away": lambda b: setattr(b, "gamma", None),
    "loaded": lambda b: b.load_state_dict(fixed_block().state_dict()),
    "loaded by assignment": lambda b: b.load_state_dict(fixed_block().state_dict(), assign=True),
    "average": lambda b: torch._foreach_lerp_(list(b.parameters()), list(fixed_block().parameters()), 0.5),
    "layer replaced": lambda b: setattr(b.mlp, "fc1", nn.Sequential(b.mlp.fc1, nn.Linear(64, 64))),
    "GELU replaced": lambda b: setattr(b.mlp, "act", nn.ReLU()),
    "GELU approximated": lambda b: setattr(b.mlp, "act", nn.GELU("tanh")),
    "narrowed by views": narrow,
    "MLP replaced": lambda b: setattr(b.mlp, "__class__", NegativeMlp),
    "dropout replaced": lambda b: setattr(b.mlp, "drop2", nn.Tanh()),
    "forward of its own": lambda b: setattr(b.mlp.fc1, "forward", lambda x: x.new_zeros(*x.shape[:-1], 64)),
    "hook": lambda b: b.mlp.fc1.register_forward_hook(lambda _, __, hidden: hidden * 2),
    "parametrized": lambda b: parametrize.register_parametrization(b.mlp.fc1, "weight", nn.Tanh()),
    "rounded in between": rounded_in_between,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_packed_weights_follow_every_change(change: Callable[[Any], object]) -> None:
    block, x = fixed_block(), torch.randn(SHAPE)
    before = branch(block, x)
    assert block in _KEPT
    with torch.no_grad():
        change(block)
    after = branch(block, x)
    assert relative_error(after, exact(block, x)) <= 2e-6
    assert relative_error(after, before) > 1e-5


class NegativeGate(Gate):
    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return -super().forward(y, x)


GATE_CHANGES: dict[str, Callable[[Any], object]] = {
    "weight": lambda b: nn.init.normal_(b.gate.linear.weight),
    "bias": lambda b: nn.init.normal_(b.gate.linear.bias),
    "eps": lambda b: setattr(b.gate, "eps", 1.0),
    "closed": lambda b: b.gate.reset_parameters(),
    "data replaced": lambda b: setattr(b.gate.linear.weight, "data", torch.randn(16, 16)),
    "parameter replaced": lambda b: setattr(b.gate.linear, "bias", nn.Parameter(torch.randn(16))),
    "loaded": lambda b: b.load_state_dict(fixed_block(**GATED).state_dict()),
    "taken away": lambda b: setattr(b, "gate", None),
    "replaced": lambda b: setattr(b.gate, "__class__", NegativeGate),
    "forward of its own": lambda b: setattr(b.gate, "forward", lambda y, x: y * x),
    "hook": lambda b: b.gate.register_forward_hook(lambda _, __, gated: gated**2),
    "parametrized": lambda b: parametrize.register_parametrization(b.gate.linear, "weight", nn.Tanh()),
}


@pytest.mark.parametrize("change", GATE_CHANGES.values(), ids=GATE_CHANGES)
def test_packed_gate_follows_every_change(change: Callable[[Any], object]) -> None:
    block, x = fixed_block(**GATED), torch.randn(SHAPE)
    before = branch(block, x)
    assert block in _KEPT
    with torch.no_grad():
        change(block)
    after = branch(block, x)
    assert relative_error(after, exact(block, x)) <= 2e-6
    assert relative_error(after, before) > 1e-5


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_packed_weights_follow_an_optimiser(options: dict[str, bool]) -> None:
    """Fused ones do not count as writing."""
    block, x = fixed_block(), torch.randn(SHAPE)
    before = branch(block, x)
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1, **options)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):  # under which no form stands in
        block(x).square().sum().backward()
    optimizer.step()
    assert relative_error(branch(block, x), exact(block, x)) <= 2e-6
    assert relative_error(branch(block, x), before) > 1e-3


def test_memory_of_replaced_weights_is_not_taken_for_theirs() -> None:
    """The allocator likes to give the same address again."""
    block, x = fixed_block(), torch.randn(SHAPE)
    branch(block, x)
    for _ in range(20):
        block.mlp.fc1.weight.data = torch.randn(64, 16)
        assert relative_error(branch(block, x), exact(block, x)) <= 2e-6


def run_with_dropout(block: SGConvNeXtBlock) -> None:
    block.mlp.drop1.p = 0.5
    block.mlp.drop1.train()


@pytest.mark.parametrize(
    ("prepare", "dtype"),
    [
        (lambda block: None, torch.float64),
        (lambda block: None, torch.bfloat16),
        (run_with_dropout, torch.float32),
        (lambda block: setattr(block.mlp, "norm", nn.LayerNorm(64)), torch.float32),
        (lambda block: setattr(block.mlp.fc1, "bias", None), torch.float32),
        (lambda block: setattr(block.mlp.fc2, "bias", None), torch.float32),
    ],
    ids=["float64", "bfloat16", "dropout", "norm", "no hidden bias", "no bias"],
)
def test_what_the_operators_cannot_do_is_not_packed(
    prepare: Callable[[SGConvNeXtBlock], object], dtype: torch.dtype
) -> None:
    block = fixed_block()
    prepare(block)
    assert branch(block.to(dtype), torch.randn(SHAPE, dtype=dtype)).isfinite().all()
    assert block not in _KEPT


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # which that switch also sets
def test_switches_are_heeded() -> None:
    block, x = fixed_block(), torch.randn(SHAPE)
    with torch.autocast("cpu", torch.float16):
        branch(block, x)
    with torch.backends.mkldnn.flags(enabled=False):
        branch(block, x)
    with torch.inference_mode():
        made_in_inference_mode = fixed_block()
    branch(made_in_inference_mode, x)
    want = branch(copy.deepcopy(block), x)
    assert relative_error(torch.vmap(functools.partial(branch, block))(x[:, None])[:, 0], want) <= 2e-6
    assert block not in _KEPT
    assert made_in_inference_mode not in _KEPT


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own
def test_forward_mode_derivatives_are_not_lost() -> None:
    block, x, v = fixed_block().requires_grad_(False), torch.randn(SHAPE), torch.randn(SHAPE)
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(block(forward_ad.make_dual(x, v))).tangent
    assert tangent is not None
    step = 1e-3 * v.double()
    slope = (exact(block, x + step) - exact(block, x - step)) / 2e-3 + v
    assert relative_error(tangent, slope) <= 1e-3


def test_weights_of_another_dtype_are_given_up() -> None:
    block, x = fixed_block(), torch.randn(SHAPE)
    branch(block, x)
    assert block in _KEPT
    branch(block.to(torch.bfloat16), x.bfloat16())
    assert block not in _KEPT


def test_what_is_kept_is_freed_when_the_block_moves() -> None:
    block = fixed_block()
    branch(block, torch.randn(SHAPE))
    assert {block, block.sgconv} <= set(_KEPT)
    block.to("meta")
    assert not {block, block.sgconv} & set(_KEPT)


def test_copies_pack_their_own() -> None:
    block, x = fixed_block(), torch.randn(SHAPE)
    want = branch(block, x)
    copied = copy.deepcopy(block)
    torch.save(block, saved := io.BytesIO())
    saved.seek(0)
    for other in (copied, torch.load(saved, weights_only=False)):
        assert other not in _KEPT
        assert torch.equal(branch(other, x), want)
        assert other in _KEPT
    assert not any("packed" in name for name in block.state_dict())


def test_counter_of_torch_sees_the_products() -> None:
    """It knows nothing of oneDNN's operators."""
    block, x = fixed_block(), torch.randn(SHAPE)
    branch(block, x)
    with FlopCounterMode(display=False) as counter:
        branch(block, x)
    assert counter.get_flop_counts()["SGConvNeXtBlock.mlp.fc1"] == {torch.ops.aten.addmm: 2 * 2 * 6 * 7 * 16 * 64}


class ZeroOperator:
    """The known signatures, with other results."""

    def __call__(self, x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return x.new_zeros(x.shape[0], weight.shape[0])

    def binary(self, x: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("operator", [lambda x: x, ZeroOperator()], ids=["signature", "result"])
def test_torch_without_the_operators_runs_the_mlp_as_it_is(
    operator: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_mlp, "_works", packed_mlp._works.__wrapped__)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", operator)
    block, x = fixed_block(), torch.randn(SHAPE)
    assert relative_error(branch(block, x), exact(block, x)) <= 2e-6
    assert block not in _KEPT


class Seen(TorchDispatchMode):
    """The names of the operators that run, seen without any hook on a module."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_whoever_looks_at_the_operators_sees_ordinary_ones() -> None:
    block, x = fixed_block(), torch.randn(SHAPE)
    want = branch(block, x)
    assert block in _KEPT
    with Seen() as seen:
        got = branch(block, x)
    assert "aten::addmm" in seen.names
    assert not any(name.startswith("mkldnn") for name in seen.names)
    assert relative_error(got, want) <= 1e-6


def test_many_sizes_need_few_programs_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which oneDNN would keep for every number of tokens."""
    monkeypatch.setattr(packed_mlp, "_SIZES", set())
    given, original = set(), packed_mlp.PackedMlp.__call__

    def counted(mlp: Any, tokens: Tensor, shortcut: Tensor) -> Tensor:
        given.add(len(tokens))
        return original(mlp, tokens, shortcut)

    monkeypatch.setattr(packed_mlp.PackedMlp, "__call__", counted)
    block = fixed_block()
    for height in range(1, 60, 3):
        for width in range(1, 80, 3):
            x = torch.randn(1, 16, height, width)
            assert relative_error(branch(block, x), exact(block, x)) <= 2e-6, (height, width)
    assert 33 < len(given) <= packed_mlp.EXACT_SIZES + 32
    assert len(packed_mlp._SIZES) == packed_mlp.EXACT_SIZES
