"""Draw what a network learnt, as a PNG.

    python -m sgconvnext.visualize kernels runs/digits/best.pth
    python -m sgconvnext.visualize footprint sgconvnext_tiny --block 2
    python -m sgconvnext.visualize features runs/digits/best.pth photo.jpg
    python -m sgconvnext.visualize erf runs/ours/best.pth --against runs/convnext/best.pth

A network is a checkpoint of train.py, or timm's name of a model, with arguments after commas. It is untrained unless
one of them is pretrained=True:
sgconvnext_tiny,ls_init_value=1.0
sgconvnext_tiny_gap3.fb_in1k,pretrained=True
"""

import argparse
from pathlib import Path
from typing import Any

import sgconvnext  # noqa: F401  registers the models with timm

from .. import console, figure
from ..errors import is_out_of_memory
from . import features, kernels, pruning
from .subject import Subject, load, untrained_convnext


@console.interruptible()
def main() -> None:
    args = parse_args()
    out = Path(args.out or f"{args.command}.png")
    try:
        figure.check(out)
        subject = load(args.network, args.use_ema, args.knobs)
        figure.save(args.draw(subject, args), out)
    except (ValueError, OSError) as error:
        console.fail("sgconvnext.visualize", error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        console.fail("sgconvnext.visualize", RuntimeError("out of memory; use a smaller network or image"))
    console.tell("sgconvnext.visualize", f"{out}: {args.command} of {subject.title}\n")


def draw_kernels(subject: Subject, args: argparse.Namespace) -> Any:
    return kernels.draw_kernels(subject, args.block - 1)


def draw_footprint(subject: Subject, args: argparse.Namespace) -> Any:
    return kernels.draw_footprint(subject, args.block - 1, args.reach)


def draw_energy(subject: Subject, args: argparse.Namespace) -> Any:
    return kernels.draw_energy(subject)


def draw_features(subject: Subject, args: argparse.Namespace) -> Any:
    return features.draw_features(subject, subject.image(Path(args.image)) if args.image else subject.images(1))


def draw_erf(subject: Subject, args: argparse.Namespace) -> Any:
    other = load(args.against) if args.against else untrained_convnext(subject)
    images = subject.image(Path(args.image)) if args.image else subject.images(args.images)
    return features.draw_receptive_fields([subject, other], images)


def draw_pruning(subject: Subject, args: argparse.Namespace) -> Any:
    found = pruning.measure(subject, args.images)
    for point in found:
        line = f"{point.order}: {100 * point.share:.0f} % of the taps pruned, top-1 {point.top1:.2f} %\n"
        console.tell("sgconvnext.visualize", line)
    return pruning.draw_pruning(subject, found)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sgconvnext.visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, draw, text in (
        ("kernels", draw_kernels, "taps against the lag, by stage and channel"),
        ("footprint", draw_footprint, "the same taps by row and column around the output"),
        ("energy", draw_energy, "energy kept against the kernel's length"),
        ("features", draw_features, "stage outputs of an image"),
        ("erf", draw_erf, "effective receptive field, beside ConvNeXt's"),
        ("pruning", draw_pruning, "top-1 against the share of taps pruned"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(draw=draw)
        sub.add_argument(
            "network",
            type=console.path,
            metavar="CHECKPOINT_OR_MODEL",
            help="checkpoint of a run, or timm's name of a model",
        )
        if name in ("features", "erf"):
            sub.add_argument(
                "image",
                nargs="?",
                type=console.path,
                metavar="IMAGE",
                help="image file (validation images of the run; noise for a model of no run)",
            )
        if name in ("kernels", "footprint"):
            sub.add_argument(
                "--block", type=console.count, default=1, metavar="N", help="block of every stage, from 1 (1)"
            )
        if name == "footprint":
            text = "rows and columns on each side of the output (the whole map)"
            sub.add_argument("--reach", type=console.count, metavar="N", help=text)
        if name == "erf":
            sub.add_argument(
                "--against",
                type=console.path,
                metavar="CHECKPOINT_OR_MODEL",
                help="network to draw beside it (an untrained ConvNeXt of its size)",
            )
            sub.add_argument(
                "--images", type=console.count, default=32, metavar="N", help="images to average over (32)"
            )
        if name == "pruning":
            sub.add_argument(
                "--images", type=console.count, default=2000, metavar="N", help="validation images (2000)"
            )
        sub.add_argument("--use-ema", action="store_true", help="take the average of the weights")
        text = "knobs of the run to change, such as data.root=PATH"
        sub.add_argument("--set", dest="knobs", nargs="+", default=[], metavar="section.key=value", help=text)
        sub.add_argument("--out", type=console.path, metavar="PNG", help=f"file to write ({name}.png)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
