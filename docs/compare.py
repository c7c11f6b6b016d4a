"""Networks side by side under one recipe: trains each with train.py, and prints a table of what came out.

    python docs/compare.py configs/sequences/digits.yaml \
        --networks model.kwargs.layers=CCCC model.kwargs.layers=AAAA --seeds 0 1 2 --out runs/compared

A network is one or more knobs of train.py, in quotes if there are several, as the shell divides them. Runs that are
finished are read, and those that were stopped go on, so the same command also prints the table of runs made in
parts.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from sgconvnext import console
from sgconvnext.training import build, checkpoint

STDERR = 2
TRAIN = Path(__file__).parents[1] / "train.py"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("knobs", nargs="*", metavar="section.key=value", help="of all networks")
    parser.add_argument("--networks", nargs="+", required=True, metavar="KNOBS", help="those of each network")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of the runs (0)")
    parser.add_argument("--out", type=Path, default=Path("runs/compared"), help="folder of all runs (runs/compared)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    seeds = " | ".join(f"seed {seed}" for seed in args.seeds)
    print(f"| network | parameters | {seeds} | mean top-1, % | loss | samples/s | GiB |")
    print(f"|---|---:|{'---:|' * len(args.seeds)}---:|---:|---:|---:|", flush=True)
    for network in args.networks:
        try:
            runs = [trained(args, network, seed) for seed in args.seeds]
        except ValueError as error:
            console.fail("compare.py", error)
        print(row(network, runs), flush=True)


def trained(args: argparse.Namespace, network: str, seed: int) -> dict[str, Any]:
    """The last epoch's metrics of a run, its number of parameters, its median speed and its memory.

    Raises:
        ValueError: train.py failed.
    """
    folder = args.out / re.sub(r"[^\w.=-]+", "_", f"{network} seed={seed}")
    knobs = [*args.knobs, *shlex.split(network), f"seed={seed}", f"out={folder}", "resume=auto"]
    # the table alone goes to standard output
    run = subprocess.run([sys.executable, str(TRAIN), args.config, *knobs], stdout=STDERR, check=False)
    if run.returncode:
        raise ValueError(f"{network}: train.py {args.config} {' '.join(knobs)} ended with exit code {run.returncode}")
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    path = str(folder / "last.pth")
    model, _ = build.trained_model(checkpoint.load(path), False, path)
    return epochs[-1] | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images_per_s": statistics.median(epoch["images_per_s"] for epoch in epochs),
        "memory_gib": max(epoch["memory_gib"] for epoch in epochs),
    }


def row(network: str, runs: list[dict[str, Any]]) -> str:
    """A network's line of the table: the loss and the speed are means over its seeds."""
    mean = {key: statistics.fmean(run[key] for run in runs) for key in ("val_top1", "val_loss", "images_per_s")}
    cells = [f"`{network}`", f"{runs[0]['parameters']:,}", *(f"{run['val_top1']:.2f}" for run in runs)]
    cells += [f"{mean['val_top1']:.2f}", f"{mean['val_loss']:.3f}", f"{mean['images_per_s']:.3g}"]
    cells += [f"{max(run['memory_gib'] for run in runs):.2f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
