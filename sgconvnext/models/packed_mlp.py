"""The block's gate and MLP for inference on a CPU: weights laid out once for oneDNN, layer scale and 1 folded in."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .kept import forget, kept

# oneDNN compiles a program for every number of tokens and keeps 1,024 of them, 0.2 MB each. So many sizes of a chunk
# are taken as they are; a further one is filled up to a multiple of 64, of 128 from 1,024 tokens on, and so on.
EXACT_SIZES, STEP = 32, 64
_SIZES: set[tuple[int, int]] = set()  # tokens and channels, of the whole process


class PackedMlp(NamedTuple):
    """x + gamma * Linear(GELU(Linear(y))), of tokens y and shortcuts x (tokens, C), as two operators.

    A gate before the norm is one more.

    torch.nn.functional.linear lays out its weights anew at every call, whatever the number of tokens: the two products
    and the GELU take 4.8 ms for 49 tokens of 768 channels, and 2.2 ms like this; 2.96 and 2.15 for 196 of 384.
    torch.compile puts the same operators in place of Linears (its freezing); they have no gradient.
    """

    hidden: tuple[Tensor, Tensor]  # weight and bias
    output: tuple[Tensor, Tensor]
    gate: tuple[Tensor, Tensor] | None
    gamma: Tensor | None = None  # where it is not in the weights

    def gated(self, tokens: Tensor, normed: Tensor) -> Tensor:
        """y * (1 + W LN(x) + b) of tokens y and LN(x)."""
        assert self.gate is not None
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(normed, tokens, *self.gate, "mul")
        return result

    def __call__(self, tokens: Tensor, shortcut: Tensor) -> Tensor:
        onednn, dtype = torch.ops.mkldnn, self.hidden[1].dtype
        hidden = onednn._linear_pointwise(tokens.to(dtype), *self.hidden, "gelu", [], "none")  # the exact GELU
        if dtype == torch.float32:
            result: Tensor = onednn._linear_pointwise.binary(hidden, shortcut, *self.output, "add")
            return result
        branch = onednn._linear_pointwise(hidden, *self.output, "none", [], "")
        return shortcut + (branch if self.gamma is None else branch * self.gamma)  # in float32, as without packing


def packed(block: Any, dtype: torch.dtype) -> PackedMlp | None:
    """The block's MLP with packed weights in a dtype, kept until the weights change.

    In float32 they take as much memory again, in bfloat16, for autocast, half of it.

    None where the operators would not do the same: for weights that are not in float32 on a CPU that has oneDNN, a
    gate in bfloat16, or if the MLP is anything but two Linears with biases and a GELU. What is kept is then freed.
    """
    mlp, gamma, gate = block.mlp, block.gamma, block.gate
    known = _is_known(mlp) and (gate is None or type(gate.linear) is nn.Linear)
    if known and torch.backends.mkldnn.enabled:
        weights = {
            "hidden": mlp.fc1.weight,
            "hidden_bias": mlp.fc1.bias,
            "output": mlp.fc2.weight,
            "bias": mlp.fc2.bias,
        }
        if gamma is not None:
            weights["gamma"] = gamma
        if gate is not None:
            weights |= {"gate": gate.linear.weight, "gate_bias": gate.linear.bias}
        able = _works() if dtype == torch.float32 else gate is None and _works_in_half()
        if all(map(_is_plain, weights.values())) and able:
            pack = _pack if dtype == torch.float32 else _pack_half
            return kept(block, dtype, list(weights.values()), lambda: pack(**weights))
    forget(block)
    return None


def chunk_size(tokens: int, channels: int, most: int) -> tuple[int, int]:
    """The tokens of a chunk, for the fewest equal chunks of at most so many, and how many to add behind the last.

    A size that is filled up may be larger than ``most``, by an eighth or by 63 tokens.
    """
    size = -(-tokens // -(-tokens // most))
    sizes = {(each, channels) for each in (size, tokens % size) if each}
    if not sizes <= _SIZES:
        if len(_SIZES | sizes) > EXACT_SIZES:
            step = max(STEP, 2 ** (size.bit_length() - 4))
            size = -(-size // step) * step
            return size, -tokens % size
        _SIZES.update(sizes)
    return size, 0


@contextlib.contextmanager
def sizes_of_their_own() -> Iterator[None]:
    """What runs inside, to be measured, has exact sizes, and leaves those of the process as they were."""
    before = set(_SIZES)
    _SIZES.clear()
    try:
        yield
    finally:
        _SIZES.clear()
        _SIZES.update(before)


def _is_known(mlp: nn.Module) -> bool:
    return (
        type(mlp) is Mlp
        and type(mlp.fc1) is type(mlp.fc2) is nn.Linear
        and type(mlp.norm) is nn.Identity
        and type(mlp.act) is nn.GELU
        and mlp.act.approximate == "none"
        and all(type(drop) is nn.Dropout and not drop.training for drop in (mlp.drop1, mlp.drop2))
    )


def _is_plain(weight: Tensor | None) -> bool:
    """Whether a weight is a parameter in float32 on a CPU, with a version: one made in inference mode has none."""
    if type(weight) is not nn.Parameter or weight.is_inference():
        return False
    return (weight.dtype, weight.device.type) == (torch.float32, "cpu")


@torch.no_grad()
def _pack(
    hidden: Tensor,
    hidden_bias: Tensor,
    output: Tensor,
    bias: Tensor,
    gamma: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> PackedMlp:
    if gamma is not None:
        output, bias = output * gamma[:, None], bias * gamma
    return PackedMlp(
        (_laid_out(hidden), hidden_bias.detach()),
        (_laid_out(output), bias.detach()),
        None if gate is None or gate_bias is None else (_laid_out(gate), 1 + gate_bias),
    )


@torch.no_grad()
def _pack_half(
    hidden: Tensor, hidden_bias: Tensor, output: Tensor, bias: Tensor, gamma: Tensor | None = None
) -> PackedMlp:
    """In bfloat16. gamma stays apart, in float32, as it does under autocast."""
    weights = [tensor.to(torch.bfloat16) for tensor in (hidden, hidden_bias, output, bias)]
    scale = None if gamma is None else gamma.detach()
    return PackedMlp((_laid_out(weights[0]), weights[1]), (_laid_out(weights[2]), weights[3]), None, scale)


@functools.cache
def _works_in_half() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself, and the operators compute what they did in 2.14."""
    capable = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if capable is None or not capable() or not _works():
        return False
    with _disable_current_modes():
        unit, bias = torch.eye(2, device="cpu", dtype=torch.float32), torch.zeros(2, device="cpu", dtype=torch.float32)
        x = torch.ones(1, 2, device="cpu", dtype=torch.float32)
        try:
            got = _pack_half(unit, bias, unit, bias)(x, x)
        except (AttributeError, TypeError, RuntimeError):
            return False
        return got.dtype == torch.float32 and torch.allclose(got, x + F.gelu(x), rtol=1e-2)


@functools.cache
def _works() -> bool:
    """Whether torch has the operators, which it does not document, and they compute what they did in 2.14."""
    with _disable_current_modes():  # a counter of FLOPs, say
        x, unit, bias = (make(2, device="cpu", dtype=torch.float32) for make in (torch.ones, torch.eye, torch.zeros))
        try:
            layer = (_laid_out(unit), bias)
            known = PackedMlp(layer, layer, layer)
            got, gated = known(x[None], x[None]), known.gated(x[None] + 1, x[None])
        except (AttributeError, TypeError, RuntimeError):
            return False
        return torch.allclose(got, x + F.gelu(x)) and torch.allclose(gated, x * (x + 1))


def _laid_out(weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return result
