"""The backends of the long convolution next to ConvNeXt's 7x7 depthwise convolution, on single layers."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import is_out_of_memory
from ..longconv import BACKENDS, available_backends, choose_backend, long_conv
from ..models.kernel import lag_taps
from ..models.layer import SGConv2d
from .table import Table, interruptible
from .timing import Step, Timing, interleave
from .workload import DTYPES, settle_backends

# bytes; a backend that would build more L x L matrices, at once or one after another, is left out
MATRIX_LIMIT = 2**30
TIE = 1.05  # backends this close to the fastest are as good: rounds differ by more
# tiny's stages at 224 px, and a map that is short enough for a matrix product
DEFAULT_SHAPES = ((96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7), (768, 4, 4))

COLUMNS = {
    "channels": "d",
    "map": "",
    "L": "d",
    "batch": "d",
    "mode": "",
    "7x7 ms": ".3g",
    "SGConv ms": ".3g",
    "ratio": ".3f",
    "kernel ms": ".3g",
    **{f"{name} ms": ".3g" for name in BACKENDS},
    "auto": "",
    "fastest": "",
    "right": "",
}
NOTES = [
    "SGConv: the whole layer with auto's choice of a backend; ratio: its speed over the 7x7 depthwise "
    "convolution's, above 1 is faster. Of its parts, kernel is the generation of the taps, which does not grow with "
    "the batch and which inference on a CPU does once, and the rest one convolution by each backend, in the dtype by "
    "autocast; fft and reference compute in fp32 and fp64 whatever it is.",
    f"right: auto's choice is the fastest, or less than {TIE - 1:.0%} slower. "
    f"-: left out, because an L x L matrix per channel takes more than {MATRIX_LIMIT / 2**30:g} GiB in all, or "
    "because triton needs a GPU and half precision.",
]


@dataclass(frozen=True)
class Layer:
    """One layer's work.

    Args:
        shape: C, H, W.
        batch: images at a time.
        mode: "inference" (forward) or "training" (forward and backward).
        dtype: of DTYPES; of the images, as a block's are under autocast.
        channels_last: memory format of images and weights.
        device: "cpu" or "cuda".
        autocast: False gives the 7x7 convolution's weights that dtype too.
    """

    shape: tuple[int, int, int]
    batch: int = 1
    mode: Literal["inference", "training"] = "inference"
    dtype: str = "fp32"
    channels_last: bool = False
    device: str = "cpu"
    autocast: bool = True

    def __str__(self) -> str:
        channels, height, width = self.shape
        return f"{self.mode} of {self.batch} x {channels} x {height} x {width}"

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the 7x7 convolution."""
        return torch.float32 if self.autocast else DTYPES[self.dtype]


def table(layers: Sequence[Layer], rounds: int, seconds: float) -> Table:
    """Time every backend on every layer in interleaved rounds.

    Args:
        layers: shapes, batches and modes.
        rounds, seconds: of `timing.interleave`.
    """
    result = Table("The long convolution's backends and the 7x7 depthwise convolution", COLUMNS, notes=list(NOTES))
    with interruptible(result):
        for layer in layers:
            found, note = _measured(layer, rounds, seconds)
            result.rows += found
            result.notes += note
    return result


def _measured(layer: Layer, rounds: int, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The row of a layer, or a note that the memory does not hold it."""
    try:
        steps = prepare(layer)
        timings = interleave(list(steps.values()), torch.device(layer.device), rounds, seconds)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return [], [f"{layer}: out of memory; not timed."]
    return [row(layer, dict(zip(steps, timings, strict=True)))], []


def prepare(layer: Layer) -> dict[str, Step]:
    """By name, a step of the 7x7 convolution, of the whole layer, of its kernel, and of every backend that fits."""
    settle_backends()
    torch.manual_seed(0)
    channels, height, width = layer.shape
    device = torch.device(layer.device)
    layout = torch.channels_last if layer.channels_last else torch.contiguous_format
    training = layer.mode == "training"
    image = torch.randn(layer.batch, *layer.shape, device=device).to(DTYPES[layer.dtype], memory_format=layout)
    image.requires_grad_(training)
    signal = image.detach().flatten(2).requires_grad_(training)
    depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, device=device)
    depthwise.to(layer.weight_dtype).to(memory_format=layout)
    mixer = SGConv2d(channels, (height, width), device=device).train(training)
    taps = lag_taps(mixer.kernel(), mixer.skip).detach().requires_grad_(training)

    steps: dict[str, Step] = {
        "7x7": _step(layer, lambda: depthwise(image), [image, *depthwise.parameters()]),
        "SGConv": _step(layer, lambda: mixer(image), [image, *mixer.parameters()]),
        "kernel": _step(layer, lambda: lag_taps(mixer.kernel(), mixer.skip), list(mixer.parameters())),
    }
    with _autocast(layer):
        backends = available_backends(signal)
    for backend in backends:
        if _matrix_bytes(backend, layer) <= MATRIX_LIMIT:
            convolve = functools.partial(long_conv, signal, taps, backend)
            steps[backend] = _step(layer, convolve, [signal, taps])
    return steps


def _step(layer: Layer, forward: Callable[[], Tensor], inputs: list[Tensor]) -> Step:
    """Forward, or forward and the gradients of its inputs."""
    autocast = _autocast(layer)

    def infer() -> None:
        with torch.inference_mode(), autocast:
            forward()

    def train() -> None:
        with autocast:
            y = forward()
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    return infer if layer.mode == "inference" else train


def _autocast(layer: Layer) -> torch.autocast:
    return torch.autocast(layer.device, DTYPES[layer.dtype], enabled=layer.autocast and layer.dtype != "fp32")


def _matrix_bytes(backend: str, layer: Layer) -> int:
    """Of the matrix (C, L, L) that a backend builds, if it builds one."""
    channels, height, width = layer.shape
    return {"toeplitz": 4, "reference": 8}.get(backend, 0) * channels * (height * width) ** 2


def row(layer: Layer, timings: dict[str, Timing]) -> dict[str, Any]:
    """A row with COLUMNS, of timings by the names of `prepare`."""
    channels, height, width = layer.shape
    backends = {name: timing.median for name, timing in timings.items() if name in BACKENDS}
    signal = torch.empty(layer.batch, channels, height * width, device=layer.device, dtype=DTYPES[layer.dtype])
    chosen, fastest = choose_backend(signal), min(backends, key=backends.__getitem__)
    right = chosen in backends and backends[chosen] < TIE * backends[fastest]
    return {
        "channels": channels,
        "map": f"{height}x{width}",
        "L": height * width,
        "batch": layer.batch,
        "mode": layer.mode,
        **{f"{name} ms": 1000 * timing.median for name, timing in timings.items()},
        "ratio": timings["SGConv"].ratio,
        "auto": chosen,
        "fastest": fastest,
        "right": "yes" if right else "no",
        "seconds": {name: timing.by_round for name, timing in timings.items()},
    }
