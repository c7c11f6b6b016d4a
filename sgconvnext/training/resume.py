"""Which checkpoint a run goes on from, what may differ from the run that wrote it, and what the checkpoint holds."""

import dataclasses
import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoint, engine, optim, origin
from .config import KNOBS, Config, flatten, from_dict, to_dict
from .run_folder import RunFolder
from .watch import score

if TYPE_CHECKING:
    from .run import Run

_logger = logging.getLogger(__name__)

KEYS = {"args", "optimizer", "amp_scaler", "progress", "best", "history", "ranks", "facts"}
# What each knob says about itself, see `knob`
FREE = {key for key, each in KNOBS.items() if each.resume != "refused"}
LOCAL = {key for key, each in KNOBS.items() if each.resume == "local"}
# With these the number of updates tells how far into an epoch a run is; in shards more are needed
ORDER = {"training_images"} | {key for key, each in KNOBS.items() if each.order == "always"}
SHARD_ORDER = {"processes"} | {key for key, each in KNOBS.items() if each.order == "shards"}


def find(config: Config, folder: RunFolder) -> Path | None:
    """The checkpoint to go on from; a folder that holds a run is only ever continued, never overwritten.

    Raises:
        ValueError: the folder holds a run and resume does not name one of its checkpoints, or none of them is good.
    """
    out, given = folder.path, Path(config.resume)
    names = ("last.pth", "best.pth", "metrics.jsonl", "config.yaml")
    held = [*folder.files(), *(out / name for name in names if (out / name).exists())]
    if config.resume == "auto":
        newest, wrong = folder.newest()
        for problem in wrong:
            _logger.warning("%s; going on from %s", problem, newest)
        if newest is None and any(path.suffix == ".pth" for path in held):
            raise ValueError(f"out={config.out!r} holds {held[0].name} but no checkpoint-*.pth; use resume={held[0]}")
        metrics, links = out / "metrics.jsonl", [out / "last.pth", out / "best.pth"]
        if newest is None and (any(map(Path.is_symlink, links)) or (metrics.exists() and metrics.stat().st_size)):
            raise ValueError(f"out={config.out!r} has lost the checkpoints of its run; name another out to start anew")
        return newest
    if held and (not config.resume or not any(_same(parent, out) for parent in given.resolve().parents)):
        raise ValueError(f"out={config.out!r} already holds a run; resume=auto continues it, another out starts anew")
    if not config.resume:
        return None
    if not _same(given.resolve().parent, out):
        return given
    target = given.resolve()  # what a link from elsewhere leads to
    return folder.behind(target.name) or out / target.name


def _same(folder: Path, other: Path) -> bool:
    """Whether both are one folder, also if they differ in case on a disk that ignores it."""
    return folder.exists() and other.exists() and folder.samefile(other)


def facts(processes: int, device: str, training: Any, validation: Any) -> dict[str, Any]:
    """What a run's numbers depend on beside its knobs: its processes, their device, and the images of both splits."""
    images = {"training_images": training, "validation_images": validation}
    told = {key: f"{len(dataset)} ({dataset.digest()[:12]})" for key, dataset in images.items()}
    return {"processes": processes, "device": device, **told}


def shared_knobs(config: Config) -> dict[str, Any]:
    """The knobs that every process must have alike. They decide the numbers of a run, or when its processes meet."""
    return {key: value for key, value in flatten(to_dict(config)).items() if key not in LOCAL}


def refuse_changes(state: dict[str, Any], config: Config, now: dict[str, Any], path: Path) -> None:
    """Refuse to go on with other knobs, processes or images, but for what allow_change names.

    Args:
        state: the checkpoint.
        config: of this run.
        now: its `facts`.
        path: of the checkpoint, for the message.

    Raises:
        ValueError: naming the knobs and facts that differ, both values and the cure.
    """
    if missing := KEYS - set(state):
        raise ValueError(
            f"resume={str(path)!r} lacks {', '.join(sorted(missing))}; start from it with model.checkpoint"
        )
    before = flatten(to_dict(from_dict(state["args"], str(path)))) | state["facts"]
    after = flatten(to_dict(config)) | now
    allowed = _allowed(config.allow_change, [*after])
    sharded = config.data.dataset.startswith("wds/")
    ordering = ORDER | SHARD_ORDER if sharded else ORDER
    free = FREE - ordering
    changed = [key for key in sorted(after) if before.get(key) != after[key] and key not in free]
    for key in changed:
        if state["progress"]["update"] and key in ordering:
            raise ValueError(
                f"resume={str(path)!r} is in the middle of an epoch, where {key}={before.get(key)} cannot become "
                f"{after[key]}; change it at an epoch's end, from a checkpoint-*-000000.pth"
            )
    if refused := [key for key in changed if not any(_covers(name, key) for name in allowed)]:
        told = ", and with ".join(f"{key}={before.get(key)}, now it is {after[key]}" for key in refused)
        raise ValueError(
            f"resume={str(path)!r} was written with {told}; go on with the former, "
            f"allow_change={','.join(refused)} to change it, or start anew with model.checkpoint"
        )


def _allowed(text: str, known: list[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not any(_covers(name, key) for key in known):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"allow_change={text!r} names {name!r}, which is no knob{hint}")
    return names


def _covers(name: str, key: str) -> bool:
    """Whether a name in allow_change is this knob, or its section."""
    return key == name or key.startswith(name + ".")


def state(run: "Run", ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of a checkpoint: all that a run needs to go on, under timm's names where it has one.

    Args:
        run: whose checkpoint it is.
        ranks: the random numbers of every process, at the epoch's start and now.
    """
    t, p = run.training, run.progress
    state = {
        "state_dict": t.model.state_dict(),
        "optimizer": t.optimizer.state_dict(),
        "amp_scaler": t.scaler.state_dict(),
        "epoch": p.epoch - 1,  # the last that is finished
        "arch": run.config.model.name,
        "args": to_dict(run.config),
        "version": checkpoint.VERSION,
        "metric": score(run.history[-1]) if run.history else None,
        "best": run.best,
        "history": run.history,
        "progress": dataclasses.asdict(p),
        "ranks": ranks,
        "facts": run.facts,
        "class_to_idx": run.class_to_idx,
    }
    state |= {key: value for key, value in (("origin", run.origin), ("tuning", run.tuning)) if value}
    return state if t.ema is None else state | {"state_dict_ema": t.ema.module.state_dict()}


def take_up(run: "Run", path: Path) -> None:
    """Put a run where a checkpoint left it; the counterpart of `state`.

    Raises:
        ValueError: the run is not the one that wrote the checkpoint, see `refuse_changes`.
    """
    state, t = checkpoint.load(path), run.training
    refuse_changes(state, run.config, run.facts, path)
    if state.get("class_to_idx") != run.class_to_idx:
        raise ValueError(f"resume={str(path)!r} was written with other classes; start anew with model.checkpoint")
    checkpoint.load_weights(t.model, checkpoint.weights(state, False, path), path)
    if t.ema is not None:
        averaged = bool(state.get("state_dict_ema"))  # False where ema.decay was 0 before
        checkpoint.load_weights(t.ema.module, checkpoint.weights(state, averaged, path), path)
    optim.refuse_other_groups(t.model, from_dict(state["args"], str(path)).optim, run.config.optim)
    optim.load_state(t.optimizer, state["optimizer"])
    if state["amp_scaler"]:
        t.scaler.load_state_dict(state["amp_scaler"])
    run.origin, run.tuning = origin.of_checkpoint(state), state.get("tuning")
    run.progress, run.history = engine.Progress(**state["progress"]), state["history"]
    if path.parent.resolve() == run.folder.path.resolve():  # else the best epoch was another folder's
        run.best = state["best"]
    if run.world.size == len(state["ranks"]):
        own = state["ranks"][run.world.rank]
        run.drawn, run.drawn_now = own["epoch"], own["now"]
    run.saver.saved = path
    _logger.info("going on from %s, after %s", path, run.progress.position())
