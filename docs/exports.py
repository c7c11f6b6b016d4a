"""What files for runtimes cost, beside those of timm's ConvNeXt: the table of docs/export.md.

    python docs/exports.py atto --batch 1 8

Every file is written by sgconvnext.formats and runs in its own runtime, with that runtime's threads. Times are medians
of turns in which the two networks run after each other; the ratio is the median of those of the turns.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import timm
import torch

import sgconvnext  # noqa: F401  registers the models
from sgconvnext import formats

FORMS = [("onnx", []), ("onnx", ["hw"]), ("openvino", []), ("pt2", [])]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", help="atto to large")
    parser.add_argument(
        "--formats", nargs="+", choices=["onnx", "openvino", "pt2"], default=["onnx", "openvino", "pt2"]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--turns", type=int, default=15)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| model | file | batch | MiB | ConvNeXt, MiB | ms | ConvNeXt, ms | ratio |")
    print("|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
    forms = [form for form in FORMS if form[0] in args.formats]
    for size, (kind, dynamic) in itertools.product(args.sizes, forms):
        with tempfile.TemporaryDirectory() as folder:
            names = [f"sgconvnext_{size}", f"convnext_{size}"]
            files = [write(name, kind, dynamic, args.img_size, Path(folder)) for name in names]
            sizes = " | ".join(f"{formats.mib(file):.1f}" for file in files)
            runs = [formats.RUN[kind](file) for file in files]
            told = f"`{kind}`" + "".join(f", `--dynamic batch {word}`" for word in dynamic)
            for batch in args.batch:
                ours, theirs = times(runs, torch.randn(batch, 3, args.img_size, args.img_size), args.turns)
                ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
                both = " | ".join(f"{1e3 * statistics.median(each):.0f}" for each in (ours, theirs))
                print(f"| {names[0]} | {told} | {batch} | {sizes} | {both} | {ratio:.2f} |", flush=True)
            del runs


def write(name: str, kind: str, dynamic: list[str], px: int, folder: Path) -> Path:
    file = folder / f"{name}{formats.SUFFIXES[kind]}"
    formats.write(timm.create_model(name), str(file), kind, size=(px, px), dynamic=["batch", *dynamic])
    return file


@torch.inference_mode()
def times(runs: list[formats.Run], x: torch.Tensor, turns: int) -> list[list[float]]:
    """Seconds of every run in every turn, after one turn that does not count."""
    found: list[list[float]] = [[] for _ in runs]
    for turn, (run, seconds) in itertools.product(range(turns + 1), list(zip(runs, found, strict=True))):
        start = time.perf_counter()
        run(x)
        if turn:
            seconds.append(time.perf_counter() - start)
    return found


if __name__ == "__main__":
    main()
