"""Train a timm model with ConvNeXt's recipe.

    python train.py configs/digits.yaml                                                             # one device
    torchrun --nproc-per-node=8 train.py configs/sgconvnext_tiny.yaml data.root=/path/to/imagenet   # one node
    python train.py configs/digits.yaml check                                                       # check only

A knob, section.key=value, overrides the YAML file; --help lists all knobs. With ``check`` the command checks the data,
the arithmetic, memory and disk, and ends before the first update. It then leaves nothing behind.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback; there is nothing to save until training begins

import argparse
import contextlib
import logging
from pathlib import Path

import sgconvnext  # registers its models with timm
from sgconvnext import console
from sgconvnext.training import backends, build, data, distributed, engine, optim, preflight, resume, rng, run_folder
from sgconvnext.training.config import Config, describe, load_config
from sgconvnext.training.run import Run, create_training, failing_in_one_line

_logger = logging.getLogger("train")


def main() -> None:
    args = parse_args()
    with contextlib.ExitStack() as opened:
        try:
            config = load_config(args.config, args.overrides)
            world = distributed.start(config.run.device)
            logging.basicConfig(level=logging.INFO if world.is_first else logging.WARNING, format="%(message)s")
            if args.check and config.data.download:
                raise ValueError("check writes nothing, so data.download=true must wait for the run")
            if not args.check or Path(config.out).exists():
                world.on_first(lambda: opened.enter_context(run_folder.lock(Path(config.out))))
            run = prepare(config, world)
            if not args.check:
                world.on_first(run.begin)
                opened.callback(run.end)
        except (ValueError, OSError) as error:  # the user's, or the disk's
            console.fail("train.py", error)
        if args.check:
            _logger.info("checked: data, arithmetic, memory and disk are as the run needs them")
        else:
            with failing_in_one_line(run):
                train(run)
        distributed.stop()


def prepare(config: Config, world: distributed.World) -> Run:
    """All that comes before the first update: data, model, optimiser and EMA, resume, preflight."""
    folder = run_folder.RunFolder(Path(config.out))
    world.agree(resume.shared_knobs(config), "give every process the same configuration")
    found: Path | None = world.on_first(lambda: resume.find(config, folder))
    rng.seed(config.seed, world.rank)
    engine.set_arithmetic(config.run.tf32, config.run.cudnn_benchmark)
    accumulation = optim.accumulation_steps(config.optim.global_batch, config.optim.batch_per_device, world.size)
    train_split, val_split, classes = data.create_splits(config, world)
    config.model.num_classes = classes  # resolved, so that a checkpoint says what its model was built with
    config.model.img_size = config.model.img_size or config.data.img_size
    model = build.create_model(config, classes, start=found is None).to(world.device)
    training = create_training(config, world, model, train_split, accumulation)  # optimiser, EMA, loss, schedule
    run = Run(training, folder, train_split, val_split)
    if found is not None:
        resume.take_up(run, found)
    world.on_each(lambda: preflight.look_ahead(training, train_split, val_split))
    run.tuning = backends.settle(training, run.tuning, sgconvnext.tune)
    return run


def train(run: Run) -> None:
    """Epoch after epoch: updates, evaluation, checkpoint."""
    if run.progress.epoch >= run.config.epochs:
        _logger.info("nothing to do: %s has finished %d epochs", run.folder.path, run.progress.epoch)
        return
    with run.training.stop:
        while run.progress.epoch < run.config.epochs:
            rates = run.train_epoch()
            metrics = run.evaluate(rates)
            run.finish_epoch(metrics)
    _logger.info("best top-1 %.2f%%; config.yaml, metrics.jsonl and checkpoints are in %s", run.best, run.folder.path)


def parse_args() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=describe(), formatter_class=formatter)
    parser.add_argument("config", type=console.path, help="YAML file, such as configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="knobs to set, or check")
    args, dashed = parser.parse_known_args()
    args.check = "check" in args.overrides
    args.overrides = [text for text in args.overrides if text != "check"] + dashed  # load_config refuses dashes
    return args


if __name__ == "__main__":
    main()
