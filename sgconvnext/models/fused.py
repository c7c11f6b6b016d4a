"""Fused forms of the block's forward: the same result in fewer passes over memory, where one is known to be faster.

`fused_forward` alone decides which form may stand in; the forms themselves ask nothing.
"""

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..longconv import BACKENDS
from ..longconv.context import is_transformed, runs_eagerly_on_cpu
from ..longconv.precision import product_dtype
from .gate import Gate
from .kept import forget
from .layer import SGConv2d
from .packed_mlp import PackedMlp, chunk_size, packed
from .ways import Way, choice, shipped_chunk, tokens_of

Form: TypeAlias = Callable[[Any, Tensor], Tensor]  # (block, x) -> the block's output


def fused_forward(block: Any, x: Any) -> Form | None:
    """The form that may stand in for ``block.forward(x)`` now, or None.

    A form calls modules with other shapes, or not at all. So gate, norm and MLP must be those of the block, which work
    token by token, and nobody may watch or replace what is inside: no hooks, no forward of their own. `triton_form`
    needs a convolution that Triton runs. The forms for a CPU need eager execution, and no transform or tracer at work.
    Packed weights also need inference in float32, or under autocast in bfloat16, after `reparameterize`. Of what may
    stand in, `ways` tells what is the fastest.
    """
    if not isinstance(x, Tensor) or not _is_known(block):
        return None
    way = choice(block, x)
    if _runs_triton(block, x, way):
        return triton_form
    if not runs_eagerly_on_cpu(x) or x.numel() == 0:
        return None
    infers = not torch.is_grad_enabled() and getattr(block.sgconv, "taps", None) is not None
    packs = infers and not _drops(block) and (way is None or way.kind == "packed")
    dtype = _packed_dtype(x) if packs else None
    if dtype is None:
        forget(block)  # an optimiser's step may follow, or the weights have another dtype now
    if is_hooked(block):
        return None
    tokens = tokens_of(x)
    most = shipped_chunk() if way is None else way.chunk(tokens)
    mlp = packed(block, dtype) if dtype is not None else None
    if mlp is not None:
        return functools.partial(packed_form, mlp=mlp, most=most)
    if torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled():
        return None  # autocast keeps no weights there: every chunk would cast them again
    return functools.partial(chunked_form, most=most) if tokens > most else None


def _packed_dtype(x: Tensor) -> torch.dtype | None:
    """In which dtype `packed` may take the weights for x: float32, or autocast's bfloat16."""
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32 if x.dtype == torch.float32 else None
    halved = torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in (torch.float32, torch.bfloat16)
    return torch.bfloat16 if halved else None


def fused_chain(blocks: nn.Sequential, x: Any) -> Callable[[Any, Tensor], Tensor] | None:
    """The form that may stand in for ``blocks(x)`` now, or None: where `triton_form` may for each, under autocast."""
    if not isinstance(x, Tensor) or product_dtype(x) == x.dtype:
        return None
    fits = all(_is_known(block) and _runs_triton(block, x, choice(block, x)) for block in blocks)
    return triton_chain if fits and not is_hooked(blocks) else None


def _is_known(block: Any) -> bool:
    return type(block.norm) is LayerNorm and type(block.mlp) is Mlp and type(block.gate) in (Gate, NoneType)


def _runs_triton(block: Any, x: Tensor, way: Way | None) -> bool:
    if (way is not None and way.kind != "triton") or BACKENDS["triton"].refusal(x) is not None:
        return False
    if type(block.sgconv) is not SGConv2d or block.sgconv.backend_for(x) != "triton":
        return False
    transformed = not torch.compiler.is_compiling() and is_transformed()
    known = type(block.drop_path) in (DropPath, nn.Identity)
    hooked = any(map(is_hooked, block.children()))  # the block's own hooks, as FSDP2 has, run around its forward
    return known and not transformed and not hooked


def is_hooked(block: nn.Module) -> bool:
    """Whether somebody watches or replaces what a module inside does: by a hook, or a forward of its own."""
    hooks = module_hooks
    everywhere = hooks._global_forward_hooks or hooks._global_forward_pre_hooks
    if everywhere or hooks._global_backward_hooks or hooks._global_backward_pre_hooks:
        return True
    for module in block.modules():  # spelled out: this runs for every block of every step
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return True
        if module._backward_hooks or module._backward_pre_hooks:
            return True
    return False


def _drops(block: Any) -> bool:
    """Whether drop path, or what was put in its place, does anything now."""
    idle = type(block.drop_path) is DropPath and not block.drop_path.training
    return not (idle or type(block.drop_path) is nn.Identity)


def triton_form(block: Any, x: Tensor) -> Tensor:
    """LN reads (B, C, L) and writes (B, L, C), and the sum goes back: the transposes cost no pass of their own."""
    return _triton_sum(block, x, x, None)[0]


def triton_chain(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """`triton_form` of a stage's blocks. The sum of each also comes in the dtype in which the next one convolves."""
    *first, last = blocks
    dtype, signal = product_dtype(x), x
    for block in first:
        x, signal = _triton_sum(block, x, signal, dtype)
    return _triton_sum(last, x, signal, None)[0]


def _triton_sum(block: Any, x: Tensor, signal: Tensor, copy: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The block's output, and a copy of it in a dtype, from its input and from what its convolution reads of that."""
    from ..longconv.triton import block as triton_block

    mixed, norm, drop_path = block.sgconv(signal).flatten(2), block.norm, block.drop_path
    if block.gate is None:
        tokens = triton_block.layer_norm_channels_last(mixed, norm.weight, norm.bias, norm.eps)
    else:  # its product is the pass that changes the layout
        tokens = norm(block.gate(mixed.transpose(1, 2), x.flatten(2).transpose(1, 2)))
    keep = None
    if isinstance(drop_path, DropPath) and drop_path.training:
        probability = 1 - drop_path.drop_prob
        keep = torch.empty(x.shape[0], device=x.device).bernoulli_(probability)
        if probability > 0 and drop_path.scale_by_keep:
            keep = keep.div_(probability)
    y, copied = triton_block.residual_and_copy(x.flatten(2), block.mlp(tokens), block.gamma, keep, copy)
    return y.view(x.shape), copied if copy is None else copied.view(x.shape)


def chunked_form(block: Any, x: Tensor, most: int) -> Tensor:
    """Gate, norm and MLP for so many tokens at a time: the hidden layer, 4 times larger, stays in the cache."""
    y = block.sgconv(x).permute(0, 2, 3, 1)
    chunks, shortcuts = _token_chunks(y, most), _token_chunks(x.permute(0, 2, 3, 1), most)
    if _drops(block):  # drop path takes whole images
        branches = [_branch(block, chunk, part) for chunk, part in zip(chunks, shortcuts, strict=True)]
        return block.drop_path(torch.cat(branches).view_as(y).permute(0, 3, 1, 2)) + x
    done = [_branch(block, chunk, part) + part for chunk, part in zip(chunks, shortcuts, strict=True)]
    return (done[0] if len(done) == 1 else torch.cat(done)).view_as(y).permute(0, 3, 1, 2)


def _branch(block: Any, y: Tensor, x: Tensor) -> Tensor:
    """gamma * MLP(LN(Gate(y, x))) of tokens (..., C)."""
    if block.gate is not None:
        y = block.gate(y, x)
    y = block.mlp(block.norm(y))
    return y if block.gamma is None else y * block.gamma


def packed_form(block: Any, x: Tensor, mlp: PackedMlp, most: int) -> Tensor:
    """As `chunked_form`, with packed weights; layer scale and sum are in the products."""
    y = block.sgconv(x).permute(0, 2, 3, 1)
    tokens, shortcuts = y.flatten(0, 2), x.permute(0, 2, 3, 1).flatten(0, 2)
    size, missing = chunk_size(tokens.shape[0], tokens.shape[1], most)
    if missing:
        tokens, shortcuts = F.pad(tokens, (0, 0, 0, missing)), F.pad(shortcuts, (0, 0, 0, missing))
    done = [_packed_sum(block, mlp, *parts) for parts in zip(tokens.split(size), shortcuts.split(size), strict=True)]
    whole = done[0] if len(done) == 1 else torch.cat(done)
    return (whole[:-missing] if missing else whole).view_as(y).permute(0, 3, 1, 2)


def _packed_sum(block: Any, mlp: PackedMlp, y: Tensor, x: Tensor) -> Tensor:
    """x + gamma * MLP(LN(Gate(y, x))) of tokens (tokens, C)."""
    if block.gate is not None:
        y = mlp.gated(y, block.gate.normed(x))
    return mlp(block.norm(y), x)


def _token_chunks(y: Tensor, most: int) -> tuple[Tensor, ...]:
    """(B, H, W, C) as the fewest equal chunks (tokens, C) of at most so many."""
    tokens = y.shape[:3].numel()
    size = -(-tokens // -(-tokens // most))
    return y.flatten(0, 2).split(size)
