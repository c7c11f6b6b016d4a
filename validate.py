"""Evaluate a checkpoint of train.py on the validation data of its run, or on another folder of the same layout.

    python validate.py --checkpoint runs/digits/best.pth [--data-root PATH] [--use-ema] [section.key=value ...]

Prints one JSON line: top1 and top5 in percent, loss, count, and unreadable (the number of images left out). Under
torchrun the processes share the images, and every image counts once.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of the imports, which take seconds

import argparse
import json
import logging

from sgconvnext import console  # sgconvnext registers its models with timm
from sgconvnext.training import build, checkpoint, data, distributed, engine, preflight

_logger = logging.getLogger("validate")


@console.interruptible()
def main() -> None:
    args = parse_args()
    try:
        state = checkpoint.load(args.checkpoint)
        root = [] if args.data_root is None else [f"data.root={args.data_root}"]
        config = build.run_config(state, args.checkpoint, [*root, *args.overrides])
        world = distributed.start(config.run.device)
        engine.set_arithmetic(config.run.tf32)
        val = world.on_each(lambda: data.create_split(config, train=False))
        data.agree(world, val=val)
        trained = data.Split(val.dataset, state.get("class_to_idx"))
        classes = data.num_classes(trained, val, config.model.num_classes)
        model = build.create_model(config, classes, start=False)
        weights = checkpoint.weights(state, args.use_ema, args.checkpoint)
        build.load_trained(model, config, state, weights, args.checkpoint)
        loader = data.create_eval_loader(val, config, world)
        for line in preflight.unread(val=val) if world.is_first else ():
            _logger.warning("%s", line)
        result = engine.evaluate(model.to(world.device), loader, config, world)
    except (ValueError, OSError) as error:
        console.fail("validate.py", error)
    if world.is_first:
        console.tell("validate.py", json.dumps(result) + "\n")
    distributed.stop()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, type=console.path, metavar="PATH", help="last.pth or best.pth of a run"
    )
    parser.add_argument("--data-root", metavar="PATH", help="folder that holds the validation split (the run's)")
    parser.add_argument("--use-ema", action="store_true", help="evaluate the average of the weights")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="knobs of the run to change")
    args, dashed = parser.parse_known_args()
    args.overrides += dashed  # refused by the same message as any other misspelt override
    return args


if __name__ == "__main__":
    main()
