"""The layer for signals next to what else mixes tokens: attention, and a convolution by torch's FFT."""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..longconv.check import relative_error
from ..sequences.layer import SGConv
from . import memory
from .session import Session
from .table import Table
from .timing import RATIO, Step
from .workload import DTYPES

HEAD = 64  # channels of an attention head, as in most language models
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}  # of what the two convolutions differ by

COLUMNS = {"L": "d", "channels": "d", "batch": "d", "mode": "", "what": ""}
COLUMNS |= {"ms": ".4g", "spread, %": ".1f", "ratio": ".3f", "peak GiB": ".3f"}
NOTES = [
    "inference: forward; training: forward and backward. All three are causal and map (B, C, L) to (B, C, L). SGConv: "
    "the whole layer, with auto's choice of a backend. rfft: the same parameters, taps by F.interpolate, and "
    "torch.fft with 2 L points. attention: torch's scaled_dot_product_attention of queries, keys and values that are "
    f"there, with heads of {HEAD} channels; its projections are not counted.",
    "ms: median over the rounds; spread: (slowest - fastest round) / median. ratio: how many times as fast as "
    f"SGConv. {RATIO}",
    "peak GiB: of a process that does only this, beyond the interpreter and its libraries (on CUDA the allocator's).",
]


@dataclass(frozen=True)
class Signals:
    """Signals, and what is done with them.

    Args:
        length: L.
        channels: C.
        batch: B.
        mode: "inference" (forward) or "training" (forward and backward).
        dtype: of DTYPES; half precision by autocast.
        device: "cpu" or "cuda".
    """

    length: int
    channels: int = 128
    batch: int = 1
    mode: str = "inference"
    dtype: str = "fp32"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.mode} of {self.batch} x {self.channels} x {self.length}"


def table(works: list[Signals], longest_attention: int, session: Session) -> Table:
    """Time the three on every work; attention up to a length, for it grows with the square."""
    result = Table("SGConv, a convolution by torch's FFT, and attention", COLUMNS, notes=list(NOTES))
    for work in works:
        names = [name for name in MIXERS if name != "attention" or work.length <= longest_attention]
        session.attempt(str(work), functools.partial(_measure, work, names, session, result))
    return result


def _measure(work: Signals, names: list[str], session: Session, result: Table) -> None:
    if (error := difference(work)) > TOLERANCE[work.dtype]:
        session.fail(f"SGConv and rfft differ by {error:.1e} in {work}.")
    steps = [prepare(name, work) for name in names]
    timings = session.time(str(work), steps, torch.device(work.device))
    del steps  # the processes that measure the memory need it
    for name, timing in zip(names, timings, strict=True):
        peak = memory.peak(f"{name}, {work}", work.device, functools.partial(prepare, name, work))
        row: dict[str, Any] = {"L": work.length, "channels": work.channels, "batch": work.batch, "mode": work.mode}
        row |= {"what": name, "ms": 1000 * timing.median, "spread, %": 100 * timing.spread, "ratio": timing.ratio}
        result.rows.append(row | {"peak GiB": peak / 2**30, "seconds": timing.by_round})


def difference(work: Signals) -> float:
    """||SGConv - rfft|| / ||rfft|| of the outputs."""
    layer, x = _layer(work)
    with torch.no_grad(), _autocast(work):
        return relative_error(layer(x), by_rfft(layer, x))


def prepare(name: str, work: Signals) -> Step:
    """A step of one of MIXERS."""
    inputs, mix = MIXERS[name](work)

    def infer() -> None:
        with torch.inference_mode(), _autocast(work):
            mix()

    def train() -> None:
        with _autocast(work):
            y = mix()
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    return infer if work.mode == "inference" else train


def _autocast(work: Signals) -> torch.autocast:
    return torch.autocast(work.device, DTYPES[work.dtype], enabled=work.dtype != "fp32")


def _layer(work: Signals) -> tuple[SGConv, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(work.batch, work.channels, work.length, device=work.device)
    return SGConv(work.channels, work.length, device=work.device), x.requires_grad_(work.mode == "training")


def _sgconv(work: Signals) -> tuple[list[Tensor], Any]:
    layer, x = _layer(work)
    return [x, *layer.parameters()], lambda: layer(x)


def _rfft(work: Signals) -> tuple[list[Tensor], Any]:
    layer, x = _layer(work)
    return [x, *layer.parameters()], lambda: by_rfft(layer, x)


def by_rfft(layer: SGConv, x: Tensor) -> Tensor:
    """What a causal SGConv computes, as it is usually written."""
    length = x.shape[-1]
    [weight], [norm] = layer.weight, layer.kernel_norm  # of the one direction
    scales = [F.interpolate(w[None], scale_factor=2 ** max(i - 1, 0), mode="linear")[0] for i, w in enumerate(weight)]
    kernel = torch.cat([scale * layer.options.alpha[0] ** i for i, scale in enumerate(scales)], dim=-1) / norm
    n = 2 * length
    spectrum = torch.fft.rfft(x.float(), n=n) * torch.fft.rfft(kernel[:, :length], n=n)
    return torch.fft.irfft(spectrum, n=n)[..., :length].to(x.dtype) + layer.skip[:, None] * x


def _attention(work: Signals) -> tuple[list[Tensor], Any]:
    torch.manual_seed(0)
    shape = (work.batch, work.channels // HEAD, work.length, HEAD)
    tokens = [torch.randn(shape, device=work.device) for _ in range(3)]
    if work.dtype != "fp32":  # as projections under autocast make them
        tokens = [each.to(DTYPES[work.dtype]) for each in tokens]
    query, key, value = (each.requires_grad_(work.mode == "training") for each in tokens)
    return [query, key, value], lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)


MIXERS = {"SGConv": _sgconv, "rfft": _rfft, "attention": _attention}


def works(lengths: list[int], channels: int, batches: list[int], modes: list[str], **how: Any) -> list[Signals]:
    """Every length, batch and mode.

    Raises:
        ValueError: the channels make no whole number of attention heads.
    """
    if channels % HEAD:
        raise ValueError(f"--channels {channels} must be a multiple of {HEAD}, the channels of an attention head")
    grid = itertools.product(lengths, batches, modes)
    return [Signals(length, channels, batch, mode, **how) for length, batch, mode in grid]
