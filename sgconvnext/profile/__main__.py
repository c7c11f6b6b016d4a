"""Profile timm's models and ours side by side.

    python -m sgconvnext.profile flops sgconvnext_tiny convnext_tiny
    python -m sgconvnext.profile throughput convnext_tiny sgconvnext_tiny --batch 1 8 --run eager compiled
    python -m sgconvnext.profile ops --batch 1 8
    python -m sgconvnext.profile ops sgconvnext_tiny_gap3
    python -m sgconvnext.profile tune sgconvnext_tiny --batch 8 --save here.json
    python -m sgconvnext.profile scaling convnext_tiny sgconvnext_tiny
    python -m sgconvnext.profile tiles
    python -m sgconvnext.profile signals --length 1024 16384
    python -m sgconvnext.profile generation --past 1024 16384

A model is timm's name, with arguments after commas: sgconvnext_tiny,backend=fft,num_scales=4

After --seconds, or Ctrl-C, a command prints what it has measured and says what it did not reach. The exit code is 130
after Ctrl-C, and 1 if a measurement failed or a result is wrong.
"""

import argparse
import functools
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
from ..tuning import BlockChoice, Choice, Tuning
from . import flops, generation, ops, plot, race, scaling, signals, throughput, tiles, tune
from .session import Session
from .table import STYLES, Table, environment, render
from .workload import DTYPES, EAGER, WAYS, Workload, network

PROGRAM = "sgconvnext.profile"
Parser = argparse.ArgumentParser


@console.interruptible()
def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    session = Session(args.rounds, args.round_seconds, args.seconds)
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        args.device = chosen_device(args.device)
        tables: list[Table] = args.measure(args, session)
        command = shlex.join(["python", "-m", PROGRAM, *sys.argv[1:]])
        facts = environment(torch.device(args.device), command, **described(args))
    except (ValueError, OSError) as error:
        console.fail(PROGRAM, error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        console.fail(PROGRAM, RuntimeError("out of memory; lower --batch or --img-size"))
    finish(tables, facts, args, session)


def finish(tables: list[Table], facts: dict[str, Any], args: argparse.Namespace, session: Session) -> None:
    """Print the tables, and end with 130 after Ctrl-C, with 1 where something is wrong."""
    if not any(table.rows for table in tables):
        if session.interrupted:
            raise KeyboardInterrupt
        console.fail(PROGRAM, ValueError(f"nothing was measured. {' '.join(session.notes())}"))
    tables[-1].notes += session.notes()
    problem = None
    try:
        if args.plot:
            plot.draw(tables[-1].rows, args.accuracies, args.plot)
    except (ValueError, OSError) as error:  # no picture is worth the measurements: they are printed first
        problem = error
    console.tell(PROGRAM, render(tables, facts, args.style))
    if problem:
        console.fail(PROGRAM, problem)
    if session.interrupted or session.failed:
        sys.exit(console.INTERRUPTED if session.interrupted else 1)


def run_flops(args: argparse.Namespace, _: Session) -> list[Table]:
    return flops.tables(args.models, args.img_size, args.batch, args.stages)


def run_throughput(args: argparse.Namespace, session: Session) -> list[Table]:
    if args.plot:
        args.plot = Path(args.plot)
        figure.check(args.plot)
    elif args.accuracy:
        raise ValueError("--accuracy is drawn by --plot; name the PNG with it")
    args.accuracies = plot.read_accuracies(Path(args.accuracy), args.models) if args.accuracy else {}
    works = workloads(args, args.batch, [args.img_size])
    return throughput.tables(args.models, works, args.group or len(args.models), session)


def run_ops(args: argparse.Namespace, session: Session) -> list[Table]:
    layers = [
        ops.Layer((channels, height, width), batch, mode, args.dtype, args.channels_last, args.device, gap)
        for batch, (channels, height, width, gap), mode in itertools.product(args.batch, shapes(args), args.mode)
    ]
    return [ops.table(layers, session)]


def run_tune(args: argparse.Namespace, session: Session) -> list[Table]:
    if args.save and not Path(args.save).resolve().parent.is_dir():
        raise ValueError(f"--save {args.save!r} is in no folder; make it, or name another file")
    choices: list[Choice | BlockChoice] = []

    def measure(spec: str, work: Workload) -> None:
        model, images, autocast = network(spec, work)
        with autocast:
            choices.extend(tune.tune(model, images).choices)

    for spec, [work] in itertools.product(args.models, workloads(args, args.batch, [args.img_size])):
        session.attempt(f"{spec}, {work}", functools.partial(measure, spec, work))
    found = Tuning(choices, tune.facts(torch.device(args.device)))
    if args.save and choices:
        found.save(args.save)
    return [found.table(), found.block_table()]


def run_scaling(args: argparse.Namespace, session: Session) -> list[Table]:
    sizes = sorted(args.img_size, key=math.prod)
    if len({math.prod(size) for size in sizes}) < len(sizes) or len(sizes) < 2:
        raise ValueError("--img-size needs two sizes or more, each of another number of pixels")
    works = [work for [work] in workloads(args, [args.batch], sizes)]
    return [scaling.table(args.models, works, session)]


def run_tiles(args: argparse.Namespace, session: Session) -> list[Table]:
    if args.device != "cuda":
        raise ValueError("tiles times the Triton programs on a CUDA device, and none is there; ops measures CPUs too")
    rows = [(channels, height, width + gap) for channels, height, width, gap in shapes(args)]
    return [tiles.table(rows, args.batch, args.device, session)]


def run_signals(args: argparse.Namespace, session: Session) -> list[Table]:
    how = {"dtype": args.dtype, "device": args.device}
    works = signals.works(args.length, args.channels, args.batch, args.mode, **how)
    return [signals.table(works, args.longest_attention, session)]


def run_generation(args: argparse.Namespace, session: Session) -> list[Table]:
    how = {"dim": args.dim, "longest_prefill": args.longest_prefill, "device": args.device}
    names = generation.names(args.layers, args.depth, args.dim)
    return [generation.table(generation.works(args.past, args.batch, **how), names, session)]


def shapes(args: argparse.Namespace) -> list[ops.Shape]:
    """Of the layers of the models and of --shape, or else the usual ones."""
    named = args.shape or ([] if args.models else ops.DEFAULT_SHAPES)
    return [*ops.shapes_of(args.models), *((*shape, 0) for shape in named)]


def workloads(args: argparse.Namespace, batches: list[int], sizes: list[tuple[int, int]]) -> list[list[Workload]]:
    """By mode, batch and size, the work in every way of --run, to which --compile and the like are added."""
    ways = [{WAYS[name]: True for name in run} for run in args.run]
    always = {field: True for field in WAYS.values() if getattr(args, field)}
    if "training" in args.mode and any("reparameterize" in way | always for way in ways):
        raise ValueError("--reparameterize, or reparameterized in --run, is for inference: such a model cannot train")
    return [
        [Workload(mode, batch, size, args.dtype, device=args.device, **(way | always)) for way in ways]
        for mode, batch, size in itertools.product(args.mode, batches, sizes)
    ]


def described(args: argparse.Namespace) -> dict[str, str]:
    """How things were run, for the line below a table."""
    if args.command == "flops":
        return {"dtype": "fp32"}
    rounds = {"rounds": f"{args.rounds} of {args.round_seconds:g} s"}
    if args.command == "tiles":
        return {"dtype": "bf16"} | rounds
    half = " autocast" + (" without a loss scale" if args.dtype == "fp16" and "training" in args.mode else "")
    layout = {"memory format": "channels_last" if args.channels_last else "contiguous"}
    return {"dtype": args.dtype + (half if args.dtype != "fp32" else "")} | layout | rounds


def chosen_device(name: str) -> str:
    """CUDA for "auto" if it is there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but no CUDA device is there; use --device cpu, or auto")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def way(text: str) -> list[str]:
    """``eager``, or names of WAYS joined by +."""
    names = text.split("+")
    if text == EAGER:
        return []
    if unknown := [name for name in names if name not in WAYS]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is unknown; use {EAGER}, {', '.join(WAYS)}, or several joined by +, as in "
            "compiled+channels-last"
        )
    return names


def parse_args() -> argparse.Namespace:
    parser = Parser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add, text in (
        ("flops", _flops, "count parameters, MACs, FLOPs and activations, by part and stage"),
        ("throughput", _throughput, "measure the speed and memory of models, run in several ways"),
        ("ops", _ops, "check and time every backend of the long convolution beside a 7x7 convolution"),
        ("tune", _tune, "check and time the backends on the convolutions of models, and save the fastest"),
        ("scaling", _scaling, "measure how speed and memory of models change with the resolution"),
        ("tiles", _tiles, "time the tiles of the Triton programs on a GPU, to choose the fastest"),
        ("signals", _signals, "time the layer for signals beside attention and a convolution by torch's FFT"),
        ("generation", _generation, "time a token of language models of SGConv and of attention after a long past"),
    ):
        add(commands.add_parser(name, help=text, description=text))
    return parser.parse_args()


def _flops(sub: Parser) -> None:
    _add_models(sub)
    _add_size(sub)
    sub.add_argument(
        "--batch",
        type=console.count,
        default=1,
        metavar="B",
        help="images of the forward pass; counts are per image (1)",
    )
    sub.add_argument("--stages", action="store_true", help="also show every part of every stage")
    _add_output(sub)
    sub.set_defaults(measure=run_flops, rounds=1, round_seconds=0, seconds=math.inf, device="cpu")


def _throughput(sub: Parser) -> None:
    _add_models(sub)
    _add_size(sub)
    _add_batches(sub, [1])
    text = (
        f"ways to run every model, in one table: {EAGER}; or {', '.join(WAYS)}, also joined by +. "
        f"With more than one way, a second table names the fastest of each model ({EAGER})"
    )
    sub.add_argument("--run", type=way, nargs="+", default=[[]], metavar="WAY", help=text)
    _add_ways(sub)
    text = "compare N models at a time; a ratio is to the first of its group (all models)"
    sub.add_argument("--group", type=console.count, metavar="N", help=text)
    sub.add_argument("--plot", type=console.path, metavar="PNG", help="draw throughput against FLOPs")
    text = "file with the columns model and top1; --plot then also draws accuracy"
    sub.add_argument("--accuracy", type=console.path, metavar="CSV", help=text)
    _add_timing(sub, ["inference"], round_seconds=5.0)
    sub.set_defaults(measure=run_throughput)


def _ops(sub: Parser) -> None:
    _add_shapes(sub)
    _add_batches(sub, [1, 8])
    sub.add_argument("--channels-last", action="store_true", help="run in channels-last memory format")
    _add_timing(sub, ["inference", "training"], round_seconds=0.5)
    sub.set_defaults(measure=run_ops)


def _tune(sub: Parser) -> None:
    _add_models(sub)
    _add_size(sub)
    _add_batches(sub, [1, 8])
    sub.add_argument("--reparameterize", action="store_true", help="with fixed taps; for inference only")
    sub.add_argument("--channels-last", action="store_true", help="run in channels-last memory format")
    sub.add_argument("--save", type=console.path, metavar="JSON", help="write the choices, for sgconvnext.Tuning.load")
    _add_machine(sub, ["inference", "training"])
    _add_output(sub)
    clock = {"rounds": race.ROUNDS, "round_seconds": race.ROUND_S, "seconds": math.inf}
    sub.set_defaults(measure=run_tune, run=[[]], compile=False, **clock)


def _scaling(sub: Parser) -> None:
    _add_models(sub)
    sizes = [(side, side) for side in (128, 224, 384, 512, 1024)]
    _add_size(sub, nargs="+", default=sizes, help="sizes of the images (128 224 384 512 1024)")
    sub.add_argument("--batch", type=console.count, default=1, metavar="B", help="images at a time (1)")
    _add_ways(sub)
    _add_timing(sub, ["inference"], round_seconds=5.0)
    sub.set_defaults(measure=run_scaling, run=[[]])


def _tiles(sub: Parser) -> None:
    _add_shapes(sub)
    _add_batches(sub, [32, 256])
    _add_clock(sub, rounds=3, round_seconds=0.2)
    sub.set_defaults(measure=run_tiles, device="auto")


def _signals(sub: Parser) -> None:
    lengths = [256, 1024, 4096, 16384, 65536]
    text = f"tokens of the signals ({' '.join(map(str, lengths))})"
    sub.add_argument("--length", type=console.count, nargs="+", default=lengths, metavar="L", help=text)
    sub.add_argument("--channels", type=console.count, default=128, metavar="C", help="of the signals (128)")
    text = f"the longest signals that attention takes, whose time grows with their square ({2**16})"
    sub.add_argument("--longest-attention", type=console.count, default=2**16, metavar="L", help=text)
    _add_batches(sub, [1])
    _add_timing(sub, ["inference", "training"], round_seconds=0.5)
    sub.set_defaults(measure=run_signals, channels_last=False)


def _generation(sub: Parser) -> None:
    pasts = [1024, 4096, 16384, 65536]
    text = f"tokens before the one that is timed ({' '.join(map(str, pasts))})"
    sub.add_argument("--past", type=console.count, nargs="+", default=pasts, metavar="T", help=text)
    text = "networks: C SGConv, A attention; one letter for all layers, or a letter for each, as in AAC (C A)"
    sub.add_argument("--layers", nargs="+", default=["C", "A"], metavar="LETTERS", help=text)
    text = "layers of a network that is given by one letter (4)"
    sub.add_argument("--depth", type=console.count, default=4, metavar="N", help=text)
    sub.add_argument("--dim", type=console.count, default=256, metavar="C", help="channels of the networks (256)")
    text = f"the longest past that attention reads; of a longer one it has random keys and values ({2**14})"
    sub.add_argument("--longest-prefill", type=console.count, default=2**14, metavar="T", help=text)
    _add_batches(sub, [1])
    _add_device(sub)
    _add_clock(sub, rounds=5, round_seconds=0.5)
    sub.set_defaults(measure=run_generation, mode=["inference"], dtype="fp32", channels_last=False)


def _add_models(sub: Parser) -> None:
    sub.add_argument("models", nargs="+", metavar="MODEL", help="timm's name, with arguments after commas")


def _add_size(sub: Parser, **changed: Any) -> None:
    usual = {"default": (224, 224), "help": "size of the images: 224 or 256x192 (224)"}
    sub.add_argument("--img-size", type=console.size, metavar="PX", **(usual | changed))


def _add_batches(sub: Parser, default: list[int]) -> None:
    text = f"images, or signals, at a time ({' '.join(map(str, default))})"
    sub.add_argument("--batch", type=console.count, nargs="+", default=default, metavar="B", help=text)


def _add_shapes(sub: Parser) -> None:
    text = "timm's name, with arguments after commas: the feature maps of its layers"
    sub.add_argument("models", nargs="*", metavar="MODEL", help=text)
    text = "further feature maps (without MODEL, those of sgconvnext_tiny at 224 px, and 768x4x4)"
    sub.add_argument("--shape", type=console.shape, nargs="+", default=[], metavar="CxHxW", help=text)


def _add_ways(sub: Parser) -> None:
    sub.add_argument("--compile", action="store_true", help="compile every model with torch.compile")
    sub.add_argument("--reparameterize", action="store_true", help="call timm's reparameterize_model for every model")
    sub.add_argument("--channels-last", action="store_true", help="run every model in channels-last memory format")


def _add_timing(sub: Parser, modes: list[str], round_seconds: float) -> None:
    _add_machine(sub, modes)
    _add_clock(sub, 5, round_seconds)


def _add_machine(sub: Parser, modes: list[str]) -> None:
    text = f"inference: forward; training: also backward and, for models, the optimiser's step ({' '.join(modes)})"
    sub.add_argument("--mode", nargs="+", choices=("inference", "training"), default=modes, help=text)
    sub.add_argument("--dtype", choices=DTYPES, default="fp32", help="half precision is by autocast (fp32)")
    _add_device(sub)


def _add_device(sub: Parser) -> None:
    sub.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is a GPU (auto)"
    )
    sub.add_argument("--threads", type=console.count, metavar="N", help="CPU threads (torch's choice)")


def _add_clock(sub: Parser, rounds: int, round_seconds: float) -> None:
    sub.epilog = (
        "In every round, what is compared runs in alternating turns. A ratio is the median over all pairs of "
        "neighbouring turns. So it can differ from the quotient of two speeds in the table."
    )
    sub.add_argument(
        "--rounds", type=console.count, default=rounds, metavar="N", help=f"rounds of each measurement ({rounds})"
    )
    seconds: dict[str, Any] = {"type": console.seconds, "metavar": "S"}
    text = f"seconds of each model, backend or tile in a round ({round_seconds:g})"
    sub.add_argument("--round-seconds", **seconds, default=round_seconds, help=text)
    text = (
        "seconds for the whole command; after them it finishes its round, prints what it has measured and says "
        "what it did not reach (no limit)"
    )
    sub.add_argument("--seconds", **seconds, default=math.inf, help=text)
    _add_output(sub)


def _add_output(sub: Parser) -> None:
    style = sub.add_mutually_exclusive_group()
    for name in STYLES:
        if name != "table":
            text = f"print {name.title() if name == 'markdown' else name.upper()} instead of plain tables"
            style.add_argument(f"--{name}", dest="style", action="store_const", const=name, help=text)
    sub.set_defaults(style="table", threads=None, plot=None)


if __name__ == "__main__":
    main()
