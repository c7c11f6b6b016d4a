"""The backends of the long convolution next to ConvNeXt's 7x7 depthwise convolution, on single layers."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..longconv import BACKENDS, available_backends, choose_backend, long_conv
from ..longconv.check import ERRORS, relative_error
from ..models.kernel import lag_taps
from ..models.layer import SGConv2d
from ..training import build
from ..tuning import TIE
from . import tune
from .session import Session
from .table import Table
from .timing import RATIO, Step, Timing
from .tune import MATRIX_LIMIT
from .workload import DTYPES, settle_backends

TRUTH_LIMIT = 2**28  # bytes of the matrices of the channels on which backends are checked
TOLERANCE = {name: tune.TOLERANCE[dtype] for name, dtype in DTYPES.items()}
SETS = {"cuda": 3}  # of inputs, taken in turns: a GPU's L2 cache holds the whole input of a late stage
Shape = tuple[int, int, int, int]  # C, H, W, and the columns between two rows
# tiny's stages at 224 px, and a map that is short enough for a matrix product
DEFAULT_SHAPES = ((96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7), (768, 4, 4))

COLUMNS = {
    "layer": "",
    "L": "d",
    "batch": "d",
    "mode": "",
    "what": "",
    "ms": ".3g",
    "spread, %": ".1f",
    "ratio": ".3f",
}
COLUMNS |= dict.fromkeys(ERRORS, ".1e") | {"peak MiB": ".1f", "mark": ""}
NOTES = [
    "layer: channels, rows, columns; 56+3: rows of 56 tokens, kept apart by 3 zeros. "
    "inference: forward; training: forward and backward. SGConv: the whole layer with auto's choice of a backend; "
    "kernel: making its taps, whatever the batch. fft and reference compute in fp32 and fp64 in any dtype. norm and "
    "sum, where triton runs: a block's layer norm and residual sum, with their changes of layout.",
    "ms: median over the rounds; spread: (slowest - fastest round) / median. ratio: how many times as fast as the 7x7 "
    f"convolution. {RATIO}",
    "errors: ||got - want|| / ||want|| of the output and the gradients of x and taps, from the definition in float64. "
    f"wrong: above {', '.join(f'{bound:g} in {dtype}' for dtype, bound in TOLERANCE.items())}. peak MiB: what a step "
    "allocates beyond its inputs; only known on CUDA.",
    f"auto: what auto chooses; too slow: it takes {TIE - 1:.0%} more than the fastest. A backend is left out where an "
    f"L x L matrix per channel takes more than {MATRIX_LIMIT / 2**30:g} GiB in all; triton needs a GPU and half "
    "precision.",
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
        row_gap: zero columns between two rows; a layer with them has a bias too.
    """

    shape: tuple[int, int, int]
    batch: int = 1
    mode: Literal["inference", "training"] = "inference"
    dtype: str = "fp32"
    channels_last: bool = False
    device: str = "cpu"
    row_gap: int = 0

    def __str__(self) -> str:
        return f"{self.mode} of {self.batch} x {' x '.join(self.sides)}"

    @property
    def sides(self) -> tuple[str, str, str]:
        """C, H and W; of rows that are g columns apart, W+g."""
        channels, height, width = map(str, self.shape)
        return channels, height, f"{width}+{self.row_gap}" if self.row_gap else width

    @property
    def length(self) -> int:
        """L."""
        return self.shape[1] * (self.shape[2] + self.row_gap)

    def images(self) -> Tensor:
        """Normal noise."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        image = torch.randn(self.batch, *self.shape, device=self.device)
        return image.to(DTYPES[self.dtype], memory_format=layout)

    def signal(self, image: Tensor) -> Tensor:
        """An image row by row (B, C, L), with zeros in the gaps."""
        return F.pad(image, (0, self.row_gap)).flatten(2)


def shapes_of(models: Sequence[str]) -> list[Shape]:
    """The maps that the SGConv layers of models are built for, each once.

    Raises:
        ValueError: a model that cannot be built, or has no such layer.
    """
    found: list[Shape] = []
    for spec in models:
        with torch.device("meta"):
            layers = [module for module in build.from_spec(spec).modules() if isinstance(module, SGConv2d)]
        if not layers:
            raise ValueError(f"{spec} has no SGConv layer; name an sgconvnext model")
        found += [(layer.channels, *layer.input_size, layer.row_gap) for layer in layers]
    return list(dict.fromkeys(found))


def table(layers: Sequence[Layer], session: Session) -> Table:
    """Check and time every backend on every layer.

    Args:
        layers: shapes, batches and modes.
        session: rounds and time. It has failed if a backend is wrong.
    """
    result = Table("The long convolution's backends and the 7x7 depthwise convolution", COLUMNS, notes=list(NOTES))
    for layer in layers:
        session.attempt(str(layer), lambda layer=layer: result.rows.extend(measure(layer, session)))  # type: ignore[misc]
    return result


def measure(layer: Layer, session: Session) -> list[dict[str, Any]]:
    """The rows of a layer. A backend that fails is left out."""
    settle_backends()
    torch.manual_seed(0)
    device = torch.device(layer.device)
    sets = [prepare(layer) for _ in range(SETS.get(layer.device, 1))]
    steps = {name: _in_turns([each[name] for each in sets]) for name in sets[0]}
    errors = errors_of(layer, [name for name in steps if name in BACKENDS], session)
    for name in [name for name in errors if is_wrong(errors[name], layer)]:
        session.fail(f"{name} in {layer} is wrong: its errors are not within {TOLERANCE[layer.dtype]:g}.")
    steps = {name: step for name, step in steps.items() if name in errors or name not in BACKENDS}
    peaks = {name: _peak(step) for name, step in steps.items()} if device.type == "cuda" else {}
    timings = session.time(str(layer), list(steps.values()), device)
    return rows(layer, dict(zip(steps, timings, strict=True)), errors, peaks)


def _in_turns(steps: Sequence[Step]) -> Step:
    """A step that is another one of them each time."""
    turn = itertools.cycle(steps)
    return lambda: next(turn)()


def prepare(layer: Layer) -> dict[str, Step]:
    """By name, a step of the 7x7 convolution, of the whole layer, of its kernel, and of every backend that fits."""
    channels, height, width = layer.shape
    training = layer.mode == "training"
    image = layer.images().requires_grad_(training)
    signal = layer.signal(image.detach()).requires_grad_(training)
    depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, device=layer.device)
    depthwise.to(memory_format=torch.channels_last if layer.channels_last else torch.contiguous_format)
    gap: dict[str, Any] = {"row_gap": layer.row_gap, "bias": layer.row_gap > 0}
    mixer = SGConv2d(channels, (height, width), **gap, device=layer.device).train(training)
    taps = lag_taps(mixer.kernel(), mixer.skip).detach().requires_grad_(training)

    steps: dict[str, Step] = {
        "7x7": _step(layer, lambda: depthwise(image), [image, *depthwise.parameters()]),
        "SGConv": _step(layer, lambda: mixer(image), [image, *mixer.parameters()]),
        "kernel": _step(layer, lambda: lag_taps(mixer.kernel(), mixer.skip), [mixer.weight, mixer.skip]),
    }
    with _autocast(layer):
        backends = available_backends(signal)
    for backend in backends:
        if _matrix_bytes(backend, layer) <= MATRIX_LIMIT:
            convolve = functools.partial(long_conv, signal, taps, backend)
            steps[backend] = _step(layer, convolve, [signal, taps])
    return steps | (_around_the_mlp(layer, signal) if "triton" in backends else {})


def _around_the_mlp(layer: Layer, signal: Tensor) -> dict[str, Step]:
    """Steps of the block's layer norm, (B, C, L) to (B, L, C), and of its residual sum, back to (B, C, L)."""
    from ..longconv.triton.block import layer_norm_channels_last, scale_residual_channels_first

    channels, training = layer.shape[0], layer.mode == "training"
    y = signal.detach().mT.contiguous().requires_grad_(training)
    shortcut = torch.randn(signal.shape, device=signal.device).requires_grad_(training)
    weight, bias, gamma = (torch.randn(channels, device=signal.device).requires_grad_(training) for _ in range(3))
    norms: dict[str, Callable[[], Tensor]] = {
        "norm by torch": lambda: F.layer_norm(signal.mT, (channels,), weight, bias, 1e-6),
        "norm by triton": lambda: layer_norm_channels_last(signal, weight, bias, 1e-6),
    }
    sums: dict[str, Callable[[], Tensor]] = {
        "sum by torch": lambda: shortcut + (y * gamma).mT,
        "sum by triton": lambda: scale_residual_channels_first(shortcut, y, gamma),
    }
    steps = {name: _step(layer, forward, [signal, weight, bias]) for name, forward in norms.items()}
    return steps | {name: _step(layer, forward, [shortcut, y, gamma]) for name, forward in sums.items()}


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
    return torch.autocast(layer.device, DTYPES[layer.dtype], enabled=layer.dtype != "fp32")


def _matrix_bytes(backend: str, layer: Layer) -> int:
    """Of the matrix (C, L, L) that a backend builds, if it builds one."""
    return {"toeplitz": 4, "reference": 8}.get(backend, 0) * layer.shape[0] * layer.length**2


def _peak(step: Step) -> float:
    """MiB that a step allocates on CUDA beyond what is there before. The first step may try out algorithms."""
    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def errors_of(layer: Layer, backends: Sequence[str], session: Session) -> dict[str, dict[str, float]]:
    """ERRORS of every backend that does not fail: relative, of random x, dy and taps, from the definition in float64.

    They are those of as many channels, from the first to the last, as there are matrices in TRUTH_LIMIT.
    """
    x, dy = (layer.signal(layer.images()) for _ in range(2))
    num_channels, length = layer.shape[0], layer.length
    taps = torch.randn(num_channels, 2 * length - 1, device=layer.device)
    num = min(num_channels, max(1, TRUTH_LIMIT // (8 * length**2)))
    some = torch.linspace(0, num_channels - 1, num, device=layer.device).long()
    truth = results("reference", *(tensor[..., some, :].double() for tensor in (x, taps, dy)))
    found = {}

    def check(backend: str) -> None:
        poison([x, taps])
        with _autocast(layer):
            own = results(backend, x, taps, dy)
        errors = [relative_error(got[..., some, :], want) for got, want in zip(own, truth, strict=True)]
        found[backend] = dict(zip(ERRORS, errors, strict=True))

    for backend in backends:
        session.attempt(f"{backend} in {layer}", functools.partial(check, backend))
    return found


def results(backend: str, x: Tensor, taps: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and dtaps."""
    x, taps = x.detach().requires_grad_(), taps.detach().requires_grad_()
    y = long_conv(x, taps, backend)
    return [y.detach(), *torch.autograd.grad(y, [x, taps], dy.to(y.dtype))]


def is_wrong(errors: dict[str, float], layer: Layer) -> bool:
    """Whether an error is too large, or NaN."""
    return not all(error <= TOLERANCE[layer.dtype] for error in errors.values())


def poison(like: Sequence[Tensor]) -> None:
    """Leave NaN in the memory that the next tensors of these sizes get, so that what is not written shows."""
    held = [torch.full_like(tensor, torch.nan) for tensor in like for _ in range(2)]
    del held


def rows(
    layer: Layer, timings: dict[str, Timing], errors: dict[str, dict[str, float]], peaks: dict[str, float]
) -> list[dict[str, Any]]:
    """A row with COLUMNS for every name of `prepare`."""
    wrong = {name for name in errors if is_wrong(errors[name], layer)}
    signal = torch.empty(1, device=layer.device, dtype=DTYPES[layer.dtype])
    chosen = choose_backend(signal.expand(layer.batch, layer.shape[0], layer.length))
    fastest = min((timings[name].median for name in errors if name not in wrong), default=0.0)
    found = []
    for name, timing in timings.items():
        marks = {
            "auto": name == chosen,
            "too slow": name == chosen and timing.median >= TIE * fastest,
            "fastest": name in errors and timing.median == fastest,
            "wrong": name in wrong,
        }
        row = {"layer": "x".join(layer.sides), "L": layer.length, "batch": layer.batch, "mode": layer.mode}
        row |= {"what": name, "ms": 1000 * timing.median, "spread, %": 100 * timing.spread, "ratio": timing.ratio}
        row |= errors.get(name, {}) | ({"peak MiB": peaks[name]} if name in peaks else {})
        mark = ", ".join(mark for mark, here in marks.items() if here)
        found.append(row | {"mark": mark, "seconds": timing.by_round})
    return found
