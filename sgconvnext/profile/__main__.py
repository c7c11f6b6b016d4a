"""Profile timm's models and ours side by side.

    python -m sgconvnext.profile flops sgconvnext_tiny convnext_tiny
    python -m sgconvnext.profile throughput convnext_tiny sgconvnext_tiny --batch 1 8 --mode inference training
    python -m sgconvnext.profile ops --batch 1 8
    python -m sgconvnext.profile scaling convnext_tiny sgconvnext_tiny
    python -m sgconvnext.profile gpu --part 1

A model is timm's name for it, with arguments of its own after commas: sgconvnext_tiny,backend=fft,num_scales=4
"""

import argparse
import itertools
import logging
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import sgconvnext  # noqa: F401  registers the models with timm

from .. import console, figure
from ..errors import is_out_of_memory
from ..files import write_whole
from ..models.sgconvnext import SIZES
from . import flops, gpu, ops, plot, scaling, throughput
from .gpu_plan import TIMED, Plan
from .table import STYLES, Table, environment, render
from .workload import DTYPES, Workload


@console.interruptible()
def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        args.device = chosen_device(args.device)
        tables = args.run(args)
        command = shlex.join(["python", "-m", "sgconvnext.profile", *sys.argv[1:]])
        facts = environment(torch.device(args.device), command, **described(args))
    except (ValueError, OSError) as error:
        console.fail("sgconvnext.profile", error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        console.fail("sgconvnext.profile", RuntimeError("out of memory; lower --batch or --img-size"))
    problem = write_files(tables, facts, args)
    console.tell("sgconvnext.profile", render(tables, facts, args.style))
    if problem:
        console.fail("sgconvnext.profile", problem)
    if not all(table.complete for table in tables):
        sys.exit(console.INTERRUPTED)


def write_files(tables: list[Table], facts: dict[str, Any], args: argparse.Namespace) -> Exception | None:
    """What is asked for beside standard output; what failed, for after that: no file is worth the measurements."""
    try:
        if getattr(args, "out", None):
            write_whole(args.out, render(tables, facts, "json").encode())
        if getattr(args, "plot", None):
            plot.draw(tables[0].rows, args.accuracies, args.plot)
    except (ValueError, OSError) as error:
        return error
    return None


def run_flops(args: argparse.Namespace) -> list[Table]:
    return flops.tables(args.models, args.img_size, args.batch, args.stages)


def run_throughput(args: argparse.Namespace) -> list[Table]:
    group = args.group or len(args.models)
    if args.plot:
        args.plot = Path(args.plot)
        figure.check(args.plot)
    elif args.accuracy:
        raise ValueError("--accuracy is drawn by --plot; name the PNG with it")
    args.accuracies = plot.read_accuracies(Path(args.accuracy), args.models) if args.accuracy else {}
    works = workloads(args, args.batch, [args.img_size])
    return [throughput.table(args.models, works, group, args.rounds, args.seconds)]


def run_ops(args: argparse.Namespace) -> list[Table]:
    layers = [
        ops.Layer(shape, batch, mode, args.dtype, args.channels_last, args.device)
        for mode, batch, shape in itertools.product(args.mode, args.batch, args.shape)
    ]
    return [ops.table(layers, args.rounds, args.seconds)]


def run_scaling(args: argparse.Namespace) -> list[Table]:
    sizes = sorted(args.img_size, key=math.prod)
    if len({math.prod(size) for size in sizes}) < len(sizes) or len(sizes) < 2:
        raise ValueError("--img-size needs two sizes or more, each of another number of pixels")
    return [scaling.table(args.models, workloads(args, [args.batch], sizes), args.rounds, args.seconds)]


def run_gpu(args: argparse.Namespace) -> list[Table]:
    for name in gpu.FOREIGN[args.part]:
        if getattr(args, name):
            parts = " or ".join(str(part) for part, names in gpu.FOREIGN.items() if name not in names)
            raise ValueError(
                f"--{name} does nothing in --part {args.part}; leave it out, or use it with --part {parts}"
            )
    args.out = Path(args.out or f"gpu_part{args.part}.json")
    if args.out.suffix.lower() != ".json":
        raise ValueError(f"--out {args.out}: the file is JSON; name it {args.out.stem}.json")
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: name a file in a folder that is there")
    backends = tuple(args.backends or gpu.BACKENDS_OF[args.part])
    plan = Plan(
        args.device, tuple(args.sizes), tuple(args.mode), backends=backends, reparameterize=args.reparameterize
    )
    return gpu.measure(args.part, plan, args.deadline)


def workloads(args: argparse.Namespace, batches: list[int], sizes: list[tuple[int, int]]) -> list[Workload]:
    """One per mode, batch and size."""
    if args.reparameterize and "training" in args.mode:
        raise ValueError("--reparameterize is for inference: a model without its kernels' parameters cannot train")
    return [
        Workload(mode, batch, size, args.dtype, args.channels_last, args.compile, args.reparameterize, args.device)
        for mode, batch, size in itertools.product(args.mode, batches, sizes)
    ]


def described(args: argparse.Namespace) -> dict[str, str]:
    """How things were run, for the line below a table."""
    if args.command == "flops":
        return {"dtype": "fp32"}
    if args.command == "gpu":
        return {"dtype": "bf16"} | gpu.facts()
    half = " autocast" + (" without a loss scale" if args.dtype == "fp16" and "training" in args.mode else "")
    return {
        "dtype": args.dtype + (half if args.dtype != "fp32" else ""),
        "memory format": "channels_last" if args.channels_last else "contiguous",
        "run": ("torch.compile" if getattr(args, "compile", False) else "eager")
        + (", reparameterized" if getattr(args, "reparameterize", False) else ""),
        "rounds": f"{args.rounds} of {args.seconds:g} s",
    }


def chosen_device(name: str) -> str:
    """CUDA for "auto" if it is there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but no CUDA device is there; use --device cpu, or auto")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sgconvnext.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    px: dict[str, Any] = {"type": console.size, "metavar": "PX"}
    many: dict[str, Any] = {"type": console.count, "metavar": "B", "nargs": "+"}

    sub = commands.add_parser("flops", help="parameters, MACs, FLOPs and activations, per part and stage")
    _add_output(sub)
    _add_models(sub)
    sub.add_argument("--img-size", **px, default=(224, 224), help="224 or 256x192 (224)")
    sub.add_argument("--batch", type=console.count, default=1, metavar="B", help="images; counts are per image (1)")
    sub.add_argument("--stages", action="store_true", help="every part of every stage too")
    sub.set_defaults(run=run_flops)

    sub = commands.add_parser("throughput", help="speed and memory of models in interleaved rounds")
    _add_output(sub)
    _add_models(sub)
    _add_timing(sub, seconds=5.0)
    sub.add_argument("--img-size", **px, default=(224, 224), help="224 or 256x192 (224)")
    sub.add_argument("--batch", **many, default=[1], help="images at a time (1)")
    _add_versions(sub)
    sub.add_argument("--group", type=console.count, metavar="N", help="compare N models at a time, with their first")
    sub.add_argument("--plot", type=console.path, metavar="PNG", help="draw throughput against FLOPs")
    sub.add_argument("--accuracy", type=console.path, metavar="CSV", help="columns model, top1: draw these too")
    sub.set_defaults(run=run_throughput)

    sub = commands.add_parser("ops", help="the long convolution's backends next to the 7x7 convolution")
    _add_output(sub)
    _add_timing(sub, seconds=1.0)
    sub.add_argument(
        "--shape",
        type=console.shape,
        nargs="+",
        default=list(ops.DEFAULT_SHAPES),
        metavar="CxHxW",
        help="layers (tiny's at 224 px, and 768x4x4)",
    )
    sub.add_argument("--batch", **many, default=[1, 8], help="images at a time (1 8)")
    sub.set_defaults(run=run_ops)

    sub = commands.add_parser("scaling", help="speed and memory against resolution")
    _add_output(sub)
    _add_models(sub)
    _add_timing(sub, seconds=5.0)
    sizes = [(side, side) for side in (128, 224, 384, 512, 1024)]
    sub.add_argument("--img-size", **px, nargs="+", default=sizes, help="(128 224 384 512 1024)")
    sub.add_argument("--batch", type=console.count, default=1, metavar="B", help="images at a time (1)")
    _add_versions(sub)
    sub.set_defaults(run=run_scaling)

    sub = commands.add_parser("gpu", help="what a GPU has to show, in parts of less than ten minutes")
    _add_output(sub)
    parts = "1: rates, cuDNN's 7x7, exactness and speed of the backends; 2: tiles of the Triton programs; 3: models"
    sub.add_argument("--part", type=int, choices=gpu.PARTS, required=True, help=parts)
    sub.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "large"], help="(tiny large)")
    _add_modes(sub, default=["inference", "training"])
    defaults = "; ".join(
        f"part {part}: {' '.join(names)}"
        for part, names in gpu.BACKENDS_OF.items()
        if "backends" not in gpu.FOREIGN[part]
    )
    sub.add_argument("--backends", nargs="+", choices=TIMED, help=f"({defaults})")
    sub.add_argument("--reparameterize", action="store_true", help="part 3: fix the taps of models that infer")
    sub.add_argument(
        "--deadline", type=console.seconds, default=gpu.DEADLINE_S, metavar="S", help=f"({gpu.DEADLINE_S:g})"
    )
    sub.add_argument("--out", type=console.path, metavar="JSON", help="file to write (gpu_partN.json)")
    sub.set_defaults(run=run_gpu, device="auto")
    return parser.parse_args()


def _add_models(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("models", nargs="+", metavar="MODEL", help="timm's name, with arguments after commas")


def _add_versions(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--compile", action="store_true", help="run torch.compile's versions")
    sub.add_argument("--reparameterize", action="store_true", help="run timm's reparameterize_model's versions")


def _add_output(sub: argparse.ArgumentParser) -> None:
    style = sub.add_mutually_exclusive_group()
    for name in STYLES:
        if name != "table":
            style.add_argument(f"--{name}", dest="style", action="store_const", const=name, help="instead of a table")
    sub.set_defaults(style="table", threads=None, device="cpu")


def _add_modes(sub: argparse.ArgumentParser, default: list[str]) -> None:
    modes = ("inference", "training")
    sub.add_argument("--mode", nargs="+", choices=modes, default=default, help=f"({' '.join(default)})")


def _add_timing(sub: argparse.ArgumentParser, seconds: float) -> None:
    _add_modes(sub, default=["inference"])
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: CUDA if there)")
    sub.add_argument("--threads", type=console.count, metavar="N", help="of a CPU (torch's choice)")
    sub.add_argument("--dtype", choices=DTYPES, default="fp32", help="half precision by autocast (fp32)")
    sub.add_argument("--channels-last", action="store_true", help="memory format of images and weights")
    sub.add_argument("--rounds", type=console.count, default=5, metavar="N", help="(5)")
    sub.add_argument(
        "--seconds", type=console.seconds, default=seconds, metavar="S", help=f"of each in a round ({seconds:g})"
    )


if __name__ == "__main__":
    main()
