"""Part 1 of the GPU plan: the device's rates, cuDNN's 7x7, the backends' exactness and speed; gpu_block goes on."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..longconv import BACKENDS, long_conv
from . import gpu_block, ops
from .gpu_plan import Deadline, Plan, Stage
from .table import Table
from .timing import Step, Timing, interleave
from .workload import settle_backends

SETS = 3  # of inputs, taken in turns: the L2 cache holds the whole input of a late stage
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}

# relative errors against float64 on the same bfloat16 inputs
ROUNDED, SUMMED = 5e-3, 1e-4  # results in bfloat16; sums of bfloat16 products in float32
BOUNDS = {"y": ROUNDED, "dx": ROUNDED, "dtaps": SUMMED}
DFT_BOUNDS = BOUNDS | {"dtaps": ROUNDED}  # it rounds the transforms of x and dy
TRUTH_BOUND = 1e-12


def tables(plan: Plan, deadline: Deadline) -> list[Table]:
    """Rates, cuDNN's 7x7, exactness, the backends beside the 7x7, and what is around the MLP: all in bfloat16.

    Args:
        plan: sizes, batches, backends.
        deadline: after which the rest is left out, and said so.
    """
    settle_backends()
    torch.manual_seed(0)
    rates = Table("Rates of the device", {"measured": "", "rate": ".4g", "unit": ""})
    deadline.run("rates", lambda: rates.rows.extend(_rates(plan)))
    depthwise, exact, speed = _depthwise_table(plan), _exactness_table(), _speed_table(plan)
    for stage, layout in itertools.product(plan.stages(), LAYOUTS):
        row = functools.partial(_depthwise, plan, stage, layout)
        _collect(deadline, depthwise, f"7x7 of {stage} in {layout}", row)
    _collect(deadline, exact, "exactness of float64", functools.partial(_truth, plan))
    for stage, backend in itertools.product(plan.stages(), plan.backends):
        row = functools.partial(exactness, plan, stage, backend)
        _collect(deadline, exact, f"exactness of {backend} in {stage}", row)
    for mode, layout, stage in itertools.product(plan.modes, LAYOUTS, plan.stages()):
        row = functools.partial(_speed, plan, stage, mode, layout)
        _collect(deadline, speed, f"{mode} of {stage} in {layout}", row)
    return [rates, depthwise, exact, speed, sums(plan, speed.rows), gpu_block.table(plan, deadline)]


def _collect(deadline: Deadline, table: Table, what: str, row: Callable[[], dict[str, Any]]) -> None:
    deadline.run(what, lambda: table.rows.append(row()))


def _time(plan: Plan, steps: Sequence[Step]) -> list[Timing]:
    return interleave(steps, torch.device(plan.device), plan.rounds, plan.seconds)


def _in_turns(steps: Sequence[Step]) -> Step:
    """A step that is another one of them each time."""
    turn = itertools.cycle(steps)
    return lambda: next(turn)()


def _rates(plan: Plan) -> list[dict[str, Any]]:
    source = torch.zeros(plan.copy_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    side = plan.matmul_side
    a, b = (torch.randn(side, side, device=plan.device).bfloat16() for _ in range(2))
    copy, product = _time(plan, [lambda: target.copy_(source), lambda: a @ b])
    return [
        {
            "measured": f"copy of {plan.copy_bytes / 2**20:g} MiB",
            "rate": 2 * plan.copy_bytes / copy.median / 1e9,
            "unit": "GB/s",
        },
        {"measured": f"{side}^3 bf16 product", "rate": 2 * side**3 / product.median / 1e12, "unit": "TFLOP/s"},
    ]


def _depthwise_table(plan: Plan) -> Table:
    columns = {"size": "", "stage": "d", "channels": "d", "map": "", "layout": ""}
    numbers = ("forward ms", "dgrad ms", "wgrad ms", "forward ps/sample", "dgrad ps/sample", "wgrad ps/sample")
    return Table(
        "cuDNN's 7x7 depthwise convolution in bf16",
        columns | dict.fromkeys(numbers, ".3g"),
        notes=[
            f"Forward of {plan.forward_batch} images; dgrad (to the input) and wgrad (to the weights) of "
            f"{plan.backward_batch}, by aten::convolution_backward. A sample is one element of the input."
        ],
    )


def _depthwise(plan: Plan, stage: Stage, layout: str) -> dict[str, Any]:
    """Forward and both gradients apart, without autograd."""
    channels, side = stage.channels, stage.side

    def images(batch: int) -> Tensor:
        x = torch.randn(batch, channels, side, side, device=plan.device)
        return x.to(torch.bfloat16, memory_format=LAYOUTS[layout])

    weight = torch.randn(channels, 1, 7, 7, device=plan.device).to(torch.bfloat16, memory_format=LAYOUTS[layout])
    forward = [_forward_step(images(plan.forward_batch), weight) for _ in range(SETS)]
    pairs = [(images(plan.backward_batch), images(plan.backward_batch)) for _ in range(SETS)]
    dgrad, wgrad = ([_backward_step(dy, x, weight, which) for dy, x in pairs] for which in ("dgrad", "wgrad"))
    timings = _time(plan, [_in_turns(forward), _in_turns(dgrad), _in_turns(wgrad)])
    row: dict[str, Any] = {"size": stage.size, "stage": stage.number, "channels": channels, "map": f"{side}x{side}"}
    row["layout"] = layout
    batches = (plan.forward_batch, plan.backward_batch, plan.backward_batch)
    names = ("forward", "dgrad", "wgrad")
    row["seconds"] = {name: timing.by_round for name, timing in zip(names, timings, strict=True)}
    for name, batch, timing in zip(names, batches, timings, strict=True):
        row[f"{name} ms"] = 1e3 * timing.median
        row[f"{name} ps/sample"] = 1e12 * timing.median / (batch * channels * side**2)
    return row


def _forward_step(x: Tensor, weight: Tensor) -> Step:
    return lambda: F.conv2d(x, weight, padding=3, groups=x.shape[1])


def _backward_step(dy: Tensor, x: Tensor, weight: Tensor, which: str) -> Step:
    mask = [which == "dgrad", which == "wgrad", False]
    return lambda: torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [3, 3], [1, 1], False, [0, 0], x.shape[1], mask
    )


def _exactness_table() -> Table:
    errors = dict.fromkeys((*BOUNDS, "bound of y, dx", "bound of dtaps"), ".1e")
    return Table(
        "Relative errors against float64 on the same bf16 inputs",
        {"size": "", "stage": "d", "L": "d", "channels": "d", "batches": "", "backend": ""}
        | errors
        | {"again": "", "right": ""},
        notes=[
            "Errors: ||got - want|| / ||want||, the worst of the batches. again: whether a second run gives the same "
            "bits, in memory that held NaN. The truth is the FFT in float64; the first row compares it with the "
            "definition."
        ],
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _gradients(x: Tensor, taps: Tensor, dy: Tensor, backend: str) -> list[Tensor]:
    """y, dx and dtaps."""
    x, taps = x.detach().requires_grad_(), taps.detach().requires_grad_()
    y = long_conv(x, taps, backend)
    return [y.detach(), *torch.autograd.grad(y, [x, taps], dy)]


def signals(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x and dy (B, C, L) in bfloat16, taps (C, 2L-1) in float32."""
    _, channels, length = shape
    x, dy = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    return x, torch.randn(channels, 2 * length - 1, device=device), dy


def poison(like: Sequence[Tensor]) -> None:
    """Leave NaN in the memory that the next tensors of these sizes get."""
    held = [torch.full_like(tensor, torch.nan) for tensor in like for _ in range(2)]
    del held


def exactness(plan: Plan, stage: Stage, backend: str) -> dict[str, Any]:
    """A backend against float64, and against itself."""
    bounds = DFT_BOUNDS if backend == "dft" else BOUNDS
    length = stage.side**2
    worst, again = dict.fromkeys(bounds, 0.0), True
    for batch in plan.check_batches:
        x, taps, dy = signals((batch, stage.channels, length), plan.device)
        want = _gradients(x.double(), taps.double(), dy.double(), "fft")
        runs = []
        for _ in range(2):
            poison([x, dy, taps])
            runs.append(_gradients(x, taps, dy, backend))
        again = again and all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
        for name, got, exact in zip(bounds, runs[0], want, strict=True):
            error = relative_error(got, exact)
            worst[name] = max(worst[name], error if error == error else torch.inf)  # max() would drop a NaN
    right = again and all(worst[name] <= bound for name, bound in bounds.items())
    return {
        "size": stage.size,
        "stage": stage.number,
        "L": length,
        "channels": stage.channels,
        "batches": " ".join(map(str, plan.check_batches)),
        "backend": backend,
        **worst,
        "bound of y, dx": bounds["y"],
        "bound of dtaps": bounds["dtaps"],
        "again": "yes" if again else "no",
        "right": "yes" if right else "no",
    }


def _truth(plan: Plan) -> dict[str, Any]:
    """The float64 FFT on this device against the definition, on two channels of the longest signals."""
    length = plan.stages()[0].side ** 2
    x, taps, dy = (tensor.double() for tensor in signals((2, 2, length), plan.device))
    got, want = (_gradients(x, taps, dy, backend) for backend in ("fft", "reference"))
    errors = dict(zip(BOUNDS, map(relative_error, got, want), strict=True))
    return {
        "L": length,
        "channels": 2,
        "batches": "2",
        "backend": "fft, float64",
        **errors,
        "bound of y, dx": TRUTH_BOUND,
        "bound of dtaps": TRUTH_BOUND,
        "right": "yes" if all(error <= TRUTH_BOUND for error in errors.values()) else "no",
    }


def _speed_table(plan: Plan) -> Table:
    others = {f"{name} ms" for name in BACKENDS if name not in plan.backends}
    columns = {name: spec for name, spec in ops.COLUMNS.items() if name not in others | {"auto", "right"}}
    return Table(
        "The backends and the 7x7 in bf16, layer by layer",
        {"size": "", "stage": "d", "layout": ""} | columns,
        notes=[
            f"Inference: forward of {plan.forward_batch} images; training: forward and both gradients of "
            f"{plan.backward_batch}. Inputs are bf16 without autocast, {SETS} sets in turns; layout: of the input. "
            "SGConv: the layer with auto's backend; kernel: making its taps, which the backends' times leave out. "
            f"-: left out, as {ops.MATRIX_LIMIT / 2**30:g} GiB do not hold its L x L matrices."
        ],
    )


def _speed(plan: Plan, stage: Stage, mode: str, layout: str) -> dict[str, Any]:
    layer = ops.Layer(
        stage.shape,
        plan.batch(mode),
        cast(Literal["inference", "training"], mode),
        "bf16",
        channels_last=layout == "NHWC",
        device=plan.device,
        autocast=False,
    )
    sets = [ops.prepare(layer) for _ in range(SETS)]
    names = [name for name in sets[0] if name not in BACKENDS or name in plan.backends]
    timings = _time(plan, [_in_turns([steps[name] for steps in sets]) for name in names])
    measured = ops.row(layer, dict(zip(names, timings, strict=True)))
    return {"size": stage.size, "stage": stage.number, "layout": layout} | measured


def sums(plan: Plan, rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds of all convolutions of a network, of what `_speed_table` has of every stage."""
    table = Table(
        "All convolutions of a network, milliseconds",
        {"size": "", "mode": "", "layout": "", "7x7 ms": ".3g"}
        | {f"{name} ms": ".3g" for name in plan.backends}
        | {"best ms": ".3g", "7x7 / best": ".3f"},
        notes=["The layers' times by the number of blocks; best: of every stage its fastest backend."],
    )
    for mode, layout, size in itertools.product(plan.modes, LAYOUTS, plan.sizes):
        stages = [stage for stage in plan.stages() if stage.size == size]
        found = {
            row["stage"]: row for row in rows if (row["mode"], row["layout"], row["size"]) == (mode, layout, size)
        }
        if len(found) < len(stages):
            continue
        row: dict[str, Any] = {"size": size, "mode": mode, "layout": layout}
        for heading in ("7x7 ms", *(f"{name} ms" for name in plan.backends)):
            if all(heading in found[stage.number] for stage in stages):
                row[heading] = sum(stage.blocks * found[stage.number][heading] for stage in stages)
        row["best ms"] = sum(
            stage.blocks * found[stage.number][f"{found[stage.number]['fastest']} ms"] for stage in stages
        )
        table.rows.append(row | {"7x7 / best": row["7x7 ms"] / row["best ms"]})
    return table
