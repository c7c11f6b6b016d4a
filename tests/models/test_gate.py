"""The gate against its definition in float64, in the block and in the network; closed and open, and what it costs.

W and b are random here: at their initial 0 no test would see the gate.
"""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from helpers import GATED, mixers, random_gates, refused, relative_error, small_model
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3, reparameterize_model
from torch import Tensor, nn

from sgconvnext.models.block import SGConvNeXtBlock
from sgconvnext.models.gate import Gate
from sgconvnext.profile.flops import CONVOLUTION, GATE, MLP, NORM, count


def gates(model: nn.Module) -> list[Gate]:
    return [module for module in model.modules() if isinstance(module, Gate)]


def gated_model(**kwargs: Any) -> Any:
    return random_gates(small_model(**({"ls_init_value": 0.5} | GATED | kwargs)))


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or (64, 64)))


# The definition


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 4, 3, 5)], ids=str)
def test_gate_computes_its_formula(shape: tuple[int, ...]) -> None:
    gate = random_gates(Gate(5, eps=0.125, dtype=torch.float64))
    y, x = torch.randn(2, *shape, dtype=torch.float64)
    want = torch.empty_like(y)
    for index in torch.cartesian_prod(*map(torch.arange, (*shape, 1))).tolist():
        *token, channel = index[:-1]
        place = tuple(token)
        centred = x[place] - x[place].sum() / 5
        normed = centred / (centred.square().sum() / 5 + 0.125).sqrt()
        factor = 1 + gate.linear.bias[channel] + sum(gate.linear.weight[channel, c] * normed[c] for c in range(5))
        want[(*place, channel)] = y[(*place, channel)] * factor
    assert relative_error(gate(y, x), want) <= 1e-12


def test_gate_of_zeros_changes_no_bit() -> None:
    y, x = 1e3 * torch.randn(2, 7, 6)
    y[0, 0], x[1] = -0.0, 0.0  # a constant token too
    gate = Gate(6)
    assert torch.equal(gate(y, x), y)
    assert torch.equal(torch.signbit(gate(y, x)), torch.signbit(y))
    assert not torch.equal(random_gates(gate)(y, x), y)


def test_gate_has_the_gradients_of_its_formula() -> None:
    gate = random_gates(Gate(3, dtype=torch.float64))
    inputs = [*torch.randn(2, 4, 3, dtype=torch.float64), *gate.parameters()]

    def function(y: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(("linear.weight", "linear.bias"), parameters, strict=True))
        result: Tensor = torch.func.functional_call(gate, state, (y, x))
        return result

    inputs = [each.detach().requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gate_of_zeros_learns() -> None:
    """Its first gradient is that of y and LN(x), and not 0."""
    gate, (y, x), dy = Gate(3, dtype=torch.float64), torch.randn(2, 4, 3).double(), torch.randn(4, 3).double()
    gate(y, x).backward(dy)
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    assert relative_error(gate.linear.weight.grad, torch.einsum("to,ti->oi", dy * y, normed)) <= 1e-9
    assert relative_error(gate.linear.bias.grad, (dy * y).sum(0)) <= 1e-9


# In the block


@pytest.mark.parametrize("ls_init_value", [0.5, None])
def test_gated_block_computes_its_formula(ls_init_value: float | None) -> None:
    block = random_gates(SGConvNeXtBlock(6, (5, 4), ls_init_value=ls_init_value, norm_eps=1e-3, **GATED).double())
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    tokens, y = x.movedim(1, -1), block.sgconv(x).movedim(1, -1)
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, False, keepdim=True) + 1e-3).sqrt()
    y = y * (1 + torch.einsum("bhwi,oi->bhwo", normed, block.gate.linear.weight) + block.gate.linear.bias)
    y = (ls_init_value or 1.0) * block.mlp(block.norm(y)).movedim(-1, 1)
    assert block.mlp.fc1.weight.shape == (21, 6)
    assert relative_error(block(x) - x, y) <= 1e-9


@pytest.mark.parametrize("value", [1, "yes", "false", 0.5, ()], ids=str)
def test_gate_is_true_or_false(value: Any) -> None:
    with refused(f"gate={value!r} must be True or False"):
        small_model(gate=value)


@pytest.mark.parametrize("value", [0, -1, 0.1, float("nan"), float("inf"), "4", [4]], ids=str)
def test_mlp_ratio_leaves_a_hidden_channel(value: Any) -> None:
    with refused(f"mlp_ratio={value!r}", "give a number such as 4"):
        small_model(mlp_ratio=value)


def test_mlp_ratio_is_that_of_every_block() -> None:
    hidden = [block.mlp.fc1.out_features for stage in small_model(mlp_ratio=2.6).stages for block in stage.blocks]
    assert hidden == [20, 41, 62, 83]  # 2.6 times 8, 16, 24, 32, rounded down


# In the network


def test_gate_is_off_unless_asked_for() -> None:
    assert not any("gate" in key for key in timm.create_model("sgconvnext_atto", device="meta").state_dict())
    assert len(gates(timm.create_model("sgconvnext_atto_gated", device="meta"))) == 2 + 2 + 6 + 2


def test_network_with_closed_gates_is_the_one_without() -> None:
    plain, gated = small_model(ls_init_value=0.5), small_model(ls_init_value=0.5, gate=True)
    told = gated.load_state_dict(plain.state_dict(), strict=False)
    assert not told.unexpected_keys
    assert all(".gate." in key for key in told.missing_keys)
    x = images()
    assert torch.equal(gated(x), plain(x))
    assert relative_error(random_gates(gated)(x), plain(x)) > 1e-3


def test_every_gate_changes_the_logits() -> None:
    model, x = gated_model(), images()
    before = model(x)
    for gate in gates(model):
        other = copy.deepcopy(model)
        gates(other)[gates(model).index(gate)].reset_parameters()
        assert relative_error(other(x), before) > 1e-4


def test_weights_after_the_meta_device_are_those_of_a_new_network() -> None:
    model = small_model(device="meta", **GATED).to_empty(device="cpu")
    for gate in gates(model):
        nn.init.constant_(gate.linear.weight, float("nan"))
        nn.init.constant_(gate.linear.bias, float("nan"))
    model.init_weights()
    assert len(gates(model)) == 4
    assert not any(parameter.any() for gate in gates(model) for parameter in gate.parameters())


def test_options_of_a_place_reach_the_gate() -> None:
    model = small_model(dtype=torch.float64, norm_eps=0.125, **GATED)
    assert {gate.linear.weight.dtype for gate in gates(model)} == {torch.float64}
    assert {gate.eps for gate in gates(model)} == {0.125}


def test_gated_atto_costs_what_the_plain_one_costs() -> None:
    names = ("sgconvnext_atto", "sgconvnext_atto_gated")
    half = {"depths": (1, 1, 3, 1), "img_size": 64}  # in half of the time
    plain, gated = (count(timm.create_model(name, **half), images()[:1]) for name in names)
    assert gated.total().parameters == pytest.approx(plain.total().parameters, rel=5e-3)
    assert gated.total().macs == pytest.approx(plain.total().macs, rel=5e-3)
    assert gated.total(part=CONVOLUTION) == plain.total(part=CONVOLUTION)
    assert gated.total(part=NORM) == plain.total(part=NORM)
    assert gated.total(part=MLP).macs == plain.total(part=MLP).macs * 3.5 / 4
    tokens, widths, depths = (256, 64, 16, 4), (40, 80, 160, 320), (1, 1, 3, 1)
    for stage, (n, channels, depth) in enumerate(zip(tokens, widths, depths, strict=True)):
        cost = gated.total(str(stage + 1), GATE)
        assert cost.macs == depth * n * (channels**2 + 4 * channels)  # fvcore: 4 per element of a bare norm
        assert cost.parameters == depth * (channels**2 + channels)
    assert plain.total(part=GATE).macs == 0


def test_gates_are_of_their_block_and_their_biases_do_not_decay() -> None:
    model = gated_model()
    groups = {
        id(p): group for group in param_groups_layer_decay(model, 0.05, layer_decay=0.5) for p in group["params"]
    }
    for stage in model.stages:
        for block in stage.blocks:
            weight, bias, hidden = (groups[id(p)] for p in (*block.gate.parameters(), block.mlp.fc1.weight))
            assert (weight["weight_decay"], bias["weight_decay"]) == (0.05, 0.0)
            assert weight["lr_scale"] == bias["lr_scale"] == hidden["lr_scale"] < 1


def test_copies_and_other_layouts_give_the_same() -> None:
    model, x = gated_model(), images()
    want = model(x)
    assert relative_error(model(x.to(memory_format=torch.channels_last)), want) <= 1e-6
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), want)
    assert relative_error(copy.deepcopy(model).double()(x.double()), want) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(x), want) <= 3e-2
    with torch.no_grad():
        assert relative_error(reparameterize_model(model)(x), want) <= 1e-5


def test_average_of_the_weights_follows_the_gates() -> None:
    model = gated_model()
    average = ModelEmaV3(model, decay=0.5)
    before = gates(model)[0].linear.weight.clone()
    nn.init.zeros_(gates(model)[0].linear.weight)
    average.update(model)
    assert relative_error(gates(average.module)[0].linear.weight, before / 2) <= 1e-6


def test_gates_stay_when_the_input_size_changes() -> None:
    model = gated_model()
    before = [gate.linear.weight.clone() for gate in gates(model)]
    model.set_input_size((96, 64))
    assert mixers(model)[0].input_size == (24, 16)
    assert all(torch.equal(gate.linear.weight, want) for gate, want in zip(gates(model), before, strict=True))
    assert model(images(96, 64)).isfinite().all()


def test_pruned_network_keeps_the_gates_of_its_stages() -> None:
    model, x = gated_model(), images()
    want = model.forward_intermediates(x, intermediates_only=True)[1]
    model.prune_intermediate_layers([1])
    assert len(gates(model)) == 2
    assert torch.equal(model(x), want)


def test_checkpointed_gradients_are_those_of_the_gated_network() -> None:
    model, x = gated_model(drop_path_rate=0.3).train(), images()
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        found.append(
            torch.autograd.grad(model(x).square().sum(), [p for gate in gates(model) for p in gate.parameters()])
        )
    for got, want in zip(*found, strict=True):
        assert want.any()
        assert relative_error(got, want) <= 1e-5
