"""The block's fused forms, in chunks of tokens on CPUs and by Triton, against its forward."""

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from helpers import GAP, GATED, random_gates, relative_error
from timm.layers import DropPath, GlobalResponseNormMlp, Mlp
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from sgconvnext.models import block, fused
from sgconvnext.models.block import SGConvNeXtBlock
from sgconvnext.models.gate import Gate
from sgconvnext.models.stage import SGConvNeXtStage

SHAPE = (3, 8, 10, 7)  # 210 tokens


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "shipped_chunk", lambda: 64)  # four chunks, which 210 does not divide into


def whole(module: SGConvNeXtBlock, *arguments: Any) -> Any:
    """The block's output, or anything else that a function makes of it, without chunks."""
    function, *rest = arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "fused_forward", lambda *_: None)
        return function(copy.deepcopy(module), *rest)


def opened(module: SGConvNeXtBlock) -> SGConvNeXtBlock:
    """With a bias and a gate, if it has them, that are not 0."""
    if module.sgconv.bias is not None:
        nn.init.normal_(module.sgconv.bias)
    opened: SGConvNeXtBlock = random_gates(module)
    return opened


def run(module: SGConvNeXtBlock, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y


def gradients(module: SGConvNeXtBlock, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(module(x), [x, *module.parameters()], dy))


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that the MLP saw."""
    seen: list[torch.Size] = []
    mlp = Mlp.forward
    monkeypatch.setattr(Mlp, "forward", lambda self, y: seen.append(y.shape) or mlp(self, y))
    return seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{"ls_init_value": 0.5}, {"ls_init_value": None}, GAP, GATED], ids=str)
def test_block_in_chunks_equals_the_whole(
    options: dict[str, Any], layout: torch.memory_format, chunks: list[torch.Size]
) -> None:
    module = opened(SGConvNeXtBlock(8, (10, 7), **{"ls_init_value": 0.5} | options)).eval()

    x = torch.randn(SHAPE).to(memory_format=layout)
    with torch.no_grad():
        y = module(x)
    assert chunks == [(53, 8), (53, 8), (53, 8), (51, 8)]
    assert y.shape == x.shape
    assert relative_error(y - x, whole(module, run, x) - x) <= 1e-6
    dy = torch.randn(SHAPE)
    for got, want in zip(gradients(module, x, dy), whole(module, gradients, x, dy), strict=True):
        assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("part", ["mlp", "norm"])
@pytest.mark.parametrize("reparameterized", [False, True])
def test_what_looks_at_the_whole_map_is_given_the_whole_map(reparameterized: bool, part: str) -> None:
    module, x = SGConvNeXtBlock(8, (10, 7), ls_init_value=1.0).eval(), torch.randn(SHAPE)
    replaced = GlobalResponseNormMlp(8, 16, use_conv=False) if part == "mlp" else GlobalResponseNorm(8)
    for parameter in replaced.parameters():
        nn.init.normal_(parameter)
    setattr(module, part, replaced)
    if reparameterized:
        module.sgconv.reparameterize()
    with torch.no_grad():
        assert torch.equal(module(x), whole(module, run, x))


def test_few_tokens_are_not_cut(chunks: list[torch.Size]) -> None:
    SGConvNeXtBlock(8, (8, 8))(torch.randn(1, 8, 8, 8))
    assert chunks == [(1, 8, 8, 8)]


@pytest.mark.parametrize("options", [{}, GATED], ids=["plain", "gated"])
def test_chunks_drop_whole_images(options: dict[str, Any], chunks: list[torch.Size]) -> None:
    module = opened(SGConvNeXtBlock(8, (10, 7), ls_init_value=1.0, drop_path=0.5, **options))
    x = torch.randn(32, 8, 10, 7)
    torch.manual_seed(0)
    branch = module(x) - x
    assert len(chunks) == 35
    torch.manual_seed(0)
    assert relative_error(branch, whole(module, run, x) - x) <= 1e-5
    kept = (branch.flatten(2).norm(dim=2) > 1e-6).float().mean(1)  # by image, the share of channels
    assert set(kept.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("training", [True, False])
def test_chunks_go_through_another_drop_path(training: bool) -> None:
    module, x = SGConvNeXtBlock(8, (10, 7), ls_init_value=1.0).train(training), torch.randn(SHAPE)
    module.drop_path = StochasticDepth(1.0, "row").train(training)
    assert (relative_error(module(x), x) == 0) == training
    module.drop_path = DropPath(1 - 1e-9).train(not training)  # as where the whole is
    assert (relative_error(module(x), x) == 0) == (not training)


def test_hook_sees_the_whole_map(chunks: list[torch.Size]) -> None:
    module, seen = SGConvNeXtBlock(8, (10, 7)), []
    handle = module.mlp.fc1.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    module(torch.randn(SHAPE))
    assert seen == [(3, 10, 7, 32)]
    handle.remove()
    module(torch.randn(SHAPE))
    assert len(chunks) == 1 + 4
    with nn.modules.module.register_module_forward_hook(lambda _, __, output: seen.append(output.shape)):
        module(torch.randn(SHAPE))
    assert (3, 10, 7, 32) in seen[1:]


class MeanGate(Gate):
    """A gate that looks at the whole map."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return super().forward(y, x.mean(dim=(0, 1, 2), keepdim=True))


@pytest.mark.parametrize("reparameterized", [False, True])
def test_gate_that_was_replaced_is_given_the_whole_map(reparameterized: bool) -> None:
    module, x = opened(SGConvNeXtBlock(8, (10, 7), ls_init_value=1.0, **GATED)).eval(), torch.randn(SHAPE)
    before = module(x)
    other = MeanGate(8)
    other.load_state_dict(module.gate.state_dict())
    module.gate = other
    if reparameterized:
        module.sgconv.reparameterize()
    with torch.no_grad():
        assert torch.equal(module(x), whole(module, run, x))
        assert relative_error(module(x), before) > 1e-3


def test_hook_on_the_gate_sees_the_whole_map() -> None:
    module, seen = opened(SGConvNeXtBlock(8, (10, 7), **GATED)), []
    module.gate.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    module(torch.randn(SHAPE))
    assert [each.shape for each in seen] == 3 * [(3, 10, 7, 8)]


def test_chunks_go_through_a_replaced_layer() -> None:
    """Adapters put their own module in the place of a Linear."""
    module, x = SGConvNeXtBlock(8, (10, 7), ls_init_value=1.0).eval(), torch.randn(SHAPE)
    before = module(x)
    module.mlp.fc1 = nn.Sequential(module.mlp.fc1, nn.Linear(32, 32))
    assert relative_error(module(x), before) > 1e-3
    assert relative_error(module(x), whole(module, run, x)) <= 1e-6


@pytest.mark.parametrize("options", [{}, GATED], ids=["plain", "gated"])
def test_chunks_under_autocast_equal_the_whole(options: dict[str, Any]) -> None:
    module, x = opened(SGConvNeXtBlock(8, (10, 7), ls_init_value=1.0, **options)).eval(), torch.randn(SHAPE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        want = whole(module, run, x)
    assert y.dtype == want.dtype
    assert relative_error(y - x, want - x) <= 1e-2


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("drop_path", "options"), [(0.0, {}), (0.5, {}), (0.0, GAP), (0.0, GATED), (0.5, GATED)], ids=str
)
def test_fused_block_equals_the_whole(drop_path: float, options: dict[str, Any]) -> None:
    """The Triton programs around the MLP, in its interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"ls_init_value": 0.5, "drop_path": drop_path, "backend": "triton", "device": device} | options
    module = opened(SGConvNeXtBlock(16, (5, 4), **options))
    x, dy = torch.randn(8, 16, 5, 4, device=device), torch.randn(8, 16, 5, 4, device=device)
    other = copy.deepcopy(module)
    other.sgconv.backend = "fft"
    found = []
    for block_ in (module, other):
        torch.manual_seed(0)
        shortcut = x.clone().requires_grad_()
        with torch.autocast(device, torch.float16):
            assert (fused.fused_forward(block_, shortcut) is fused.triton_form) == (block_ is module)
            y = block_(shortcut)
        found.append([y - x, *torch.autograd.grad(y, [shortcut, *block_.parameters()], dy)])
        assert y.dtype == torch.float32
    if drop_path:  # the two draw numbers of their own
        with torch.no_grad(), torch.autocast(device, torch.float16):
            branch = module.eval()(x) - x
        ratio = found[0][0].flatten(1).norm(dim=1) / branch.flatten(1).norm(dim=1)
        assert {round(value, 2) for value in ratio.tolist()} == {0.0, 2.0}
    else:
        for got, want in zip(*found, strict=True):
            assert relative_error(got, want) <= 1e-2


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.end_to_end),
        pytest.param(GAP, marks=pytest.mark.end_to_end),
        GATED,
    ],
    ids=["plain", "gap", "gated"],
)
def test_chain_of_fused_blocks_equals_one_after_another(options: dict[str, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stage = SGConvNeXtStage(
        16, 16, depth=3, grid=(5, 4), stride=1, dilation=(1, 1), drop_path=[0.0] * 3, ls_init_value=0.5,
        backend="triton", device=device, **options,
    )  # fmt: skip
    for block_ in stage.blocks:
        opened(block_)
    x, dy = torch.randn(2, 16, 5, 4, device=device), torch.randn(2, 16, 5, 4, device=device)
    found = []
    for alone in (False, True):
        inputs = [x.clone().requires_grad_(), *stage.parameters()]
        with torch.autocast(device, torch.float16):
            assert fused.fused_chain(stage.blocks, inputs[0]) is fused.triton_chain
            y = stage.blocks(inputs[0]) if alone else stage(inputs[0])
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) <= 1e-3


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_chain_is_not_taken_where_it_would_be_missed() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = torch.nn.Sequential(*(SGConvNeXtBlock(16, (5, 4), backend="triton", device=device) for _ in range(2)))
    x = torch.randn(2, 16, 5, 4, device=device)
    assert fused.fused_chain(blocks, x) is None  # full precision
    with torch.autocast(device, torch.float16):
        assert fused.fused_chain(blocks, x) is fused.triton_chain
        for module in (blocks, blocks[0], blocks[1].mlp):
            handle = module.register_forward_hook(lambda *_: None)
            assert fused.fused_chain(blocks, x) is None
            handle.remove()
        blocks[1].sgconv.backend = "fft"
        assert fused.fused_chain(blocks, x) is None


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_runs_a_block_with_hooks_of_its_own_but_none_inside() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = SGConvNeXtBlock(16, (5, 4), backend="triton", device=device)
    x = torch.randn(2, 16, 5, 4, device=device)
    module.register_forward_pre_hook(lambda *_: None)  # as FSDP2 does
    with torch.autocast(device, torch.float16):
        assert fused.fused_forward(module, x) is fused.triton_form
        module.mlp.fc1.register_forward_pre_hook(lambda *_: None)
        assert fused.fused_forward(module, x) is None


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.end_to_end), GATED], ids=["plain", "gated"])
def test_fused_block_has_second_derivatives(options: dict[str, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = opened(SGConvNeXtBlock(16, (5, 4), ls_init_value=0.5, backend="triton", device=device, **options))
    other = copy.deepcopy(module)
    other.sgconv.backend = "reference"
    x = torch.randn(2, 16, 5, 4, device=device, requires_grad=True)

    def product(module: SGConvNeXtBlock) -> list[torch.Tensor]:
        inputs = [x, *module.parameters()]
        with torch.autocast(device, torch.float16):
            assert (fused.fused_forward(module, x) is fused.triton_form) == (module is not other)
            first = torch.autograd.grad(module(x).pow(3).mean(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(t.square().sum() for t in first), inputs))

    for (name, _), got, want in zip(
        [("x", None), *module.named_parameters()], product(module), product(other), strict=True
    ):
        assert relative_error(got, want) <= 3e-2, name


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("options", [{}, GATED], ids=["plain", "gated"])
def test_transforms_see_the_fused_block_unfused(options: dict[str, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = opened(SGConvNeXtBlock(16, (5, 4), ls_init_value=0.5, backend="triton", device=device, **options))
    x = torch.randn(3, 2, 16, 5, 4, device=device, dtype=torch.float16)
    module.half()
    with torch.no_grad():
        assert relative_error(torch.vmap(module)(x), module(x.flatten(0, 1)).unflatten(0, (3, 2))) <= 1e-2
