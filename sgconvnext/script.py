"""Run a script that imports timm alone, with our models registered.

    python -m sgconvnext.script validate.py /path/to/imagenet --model sgconvnext_tiny --checkpoint model.pth
    torchrun --nproc-per-node=8 -m sgconvnext.script train.py --data-dir /path/to/imagenet --model sgconvnext_tiny

The script gets the arguments after its name and runs as ``python SCRIPT`` runs it, so also timm's train.py,
validate.py, benchmark.py, inference.py and onnx_export.py.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

from . import console


def main() -> None:
    args = parse_args()
    if not (os.path.isfile(args.script) and os.access(args.script, os.R_OK)):
        error = ValueError(f"script {args.script!r} is no file that can be read; give the path of a script")
        console.fail("sgconvnext.script", error)
    sys.argv = [args.script, *args.arguments]
    if sys.path[0] == os.getcwd():  # which python -m puts there, and python SCRIPT does not
        del sys.path[0]
    sys.path.insert(0, str(Path(args.script).resolve().parent))  # whose modules the script can import
    runpy.run_path(args.script, run_name="__main__")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sgconvnext.script",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", metavar="SCRIPT", type=console.path, help="path of the script")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="of the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
