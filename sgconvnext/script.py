"""Run a script that imports timm alone, with our models registered.

    python -m sgconvnext.script validate.py /path/to/imagenet --model sgconvnext_tiny --checkpoint model.pth
    torchrun --nproc-per-node=8 -m sgconvnext.script train.py --data-dir /path/to/imagenet --model sgconvnext_tiny

The script gets the arguments after its name and runs as ``python SCRIPT`` runs it, so also timm's train.py,
validate.py, benchmark.py, inference.py and onnx_export.py. Processes that it spawns, and does not fork, know the
models only if they import sgconvnext themselves.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

from . import console


def main() -> None:
    script = parse_args().script
    if not (os.path.isfile(script) and os.access(script, os.R_OK)):
        error = ValueError(f"script {script!r} is no file that can be read; give the path of a script")
        console.fail("sgconvnext.script", error)
    sys.argv = [script, *sys.argv[2:]]
    if sys.path[0] == os.getcwd():  # which python -m puts there, and python SCRIPT does not
        del sys.path[0]
    sys.path.insert(0, str(Path(script).resolve().parent))  # whose modules the script can import
    runpy.run_path(os.path.abspath(script), run_name="__main__")  # __file__ is absolute, as in python SCRIPT


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sgconvnext.script",
        usage="%(prog)s SCRIPT [ARGUMENTS ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", metavar="SCRIPT", type=console.path, help="path of the script")
    return parser.parse_args(sys.argv[1:2])  # all that follows is the script's, "--" too


if __name__ == "__main__":
    main()
