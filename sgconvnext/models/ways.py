"""Which form of a block's forward is the fastest: as `sgconvnext.tune` measured it here, or else as shipped."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..longconv.context import is_recorded
from ..longconv.precision import product_dtype
from ..longconv.tuned import Work, nearest

KINDS = ("modules", "packed", "triton")


class Way(NamedTuple):
    """How a block runs.

    Args:
        kind: "modules" calls norm and MLP as they are; "packed" takes the weights that `packed_mlp` laid out; "triton"
            takes the norm and the sum of `longconv.triton.block`.
        most: tokens that go through norm and MLP at a time, on a CPU; 0 for all of them.
    """

    kind: str
    most: int = 0

    def __str__(self) -> str:
        return f"{self.kind}/{self.most}" if self.most else self.kind

    @classmethod
    def of(cls, name: str) -> "Way":
        """The counterpart of `str`.

        Raises:
            ValueError: there is no such way.
        """
        kind, _, most = name.partition("/")
        if kind not in KINDS or not (most.isdecimal() or not most):
            raise ValueError(f"a block cannot run by {name!r}; use one of {', '.join(KINDS)}, or modules/1024")
        return cls(kind, int(most or 0))

    def chunk(self, tokens: int) -> int:
        """The most tokens of a chunk."""
        return self.most or tokens


class Block(NamedTuple):
    """What a way is chosen for, but for the number of tokens.

    Args:
        device: type of the device.
        dtype: in which products are made, autocast considered.
        channels, hidden: C, and that of the MLP's hidden layer.
        gated: whether there is a gate before the norm.
        work: what is done; "frozen" is inference with fixed taps.
    """

    device: str
    dtype: torch.dtype
    channels: int
    hidden: int
    gated: bool
    work: Work


_MEASURED: dict[Block, dict[int, Way]] = {}  # to the way by tokens
_FORCED: list[Way | None] = []


@functools.cache
def shipped_chunk() -> int:
    """Tokens of a chunk on a CPU where nothing was measured.

    Measured with widths 96 to 768, forward and backward: 1,024 on an AMD EPYC (Zen 4, 1 MiB of cache a core), 4,096 on
    an Intel Xeon with AMX (2 MiB a core), where 16 images of tiny's first stage take 294 ms by 1,024 and 264 by 4,096.
    """
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return 4096 if has_amx() else 1024


def block_of(block: Any, x: Tensor) -> Block:
    """What a block does now with a map x (B, C, H, W)."""
    fixed = getattr(block.sgconv, "taps", None) is not None
    work: Work = "training" if torch.is_grad_enabled() else "frozen" if fixed else "inference"
    hidden = block.mlp.fc1.out_features
    return Block(x.device.type, product_dtype(x), x.shape[1], hidden, block.gate is not None, work)


def tokens_of(x: Tensor) -> int:
    """Of all images of a map (B, C, H, W) together."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def choice(block: Any, x: Tensor) -> Way | None:
    """The way that was measured to be the fastest, for half to twice as many tokens too; None for as shipped.

    None too in exports and, but on CUDA, in what is compiled: a size that is left open would be bound by a comparison.
    """
    if _FORCED:
        return _FORCED[-1]
    if not _MEASURED or is_recorded() or (torch.compiler.is_compiling() and not x.is_cuda):
        return None
    return nearest(_MEASURED.get(block_of(block, x), {}), tokens_of(x))


def prefer(which: Block, tokens: int, way: Way) -> None:
    """Let blocks run like that, from now on and in the whole process."""
    _MEASURED.setdefault(which, {})[tokens] = way


def forget() -> None:
    """Let blocks run as shipped again."""
    _MEASURED.clear()


@contextlib.contextmanager
def only(way: Way | None) -> Iterator[None]:
    """Let every block in the code inside run like that, or, where it cannot, by its modules; with None, as shipped."""
    _FORCED.append(way)
    try:
        yield
    finally:
        _FORCED.pop()
