"""Which checkpoint a run goes on from, and which differences from the run that wrote it are refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused
from training_helpers import DISKS, disk_without, flatten, micro_config

from sgconvnext.training import checkpoint, resume
from sgconvnext.training.config import Config, from_dict, to_dict
from sgconvnext.training.run_folder import RunFolder

STATE = {"state_dict": {"weight": torch.arange(4.0)}}


def run(path: Path, *epochs: int) -> RunFolder:
    """A folder with good checkpoints after those epochs."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    for epoch in epochs:
        folder.add(folder.file(epoch, 0), STATE, keep=99, best=epoch == min(epochs))
    return folder


def found(folder: RunFolder, given: object) -> Path | None:
    return resume.find(micro_config(out=str(folder.path), resume=str(given)), folder)


# ---- which one


def test_auto_begins_where_there_is_nothing_and_goes_on_from_the_newest(tmp_path: Path) -> None:
    assert found(RunFolder(tmp_path / "none"), "auto") is None
    assert found(run(tmp_path), "auto") is None
    (tmp_path / "metrics.jsonl").touch()  # killed in its first epoch
    assert found(run(tmp_path), "auto") is None
    assert found(run(tmp_path, 1, 2), "auto") == tmp_path / "checkpoint-0002-000000.pth"


def test_auto_goes_back_to_the_newest_good_one_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run(tmp_path, 1, 2)
    folder.file(2, 0).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert found(folder, "auto") == folder.file(1, 0)
    [line] = [record.getMessage() for record in caplog.records]
    assert "checkpoint-0002-000000.pth" in line
    assert "damaged" in line
    assert line.endswith(f"going on from {folder.file(1, 0)}")


def test_auto_is_refused_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    folder = run(tmp_path, 1, 2)
    for path in folder.files():
        path.write_bytes(b"")
    with refused(str(tmp_path), "no good checkpoint among 2"):
        found(folder, "auto")


@pytest.mark.parametrize("name", ["best.pth", "last.pth"])
def test_auto_does_not_pass_over_a_lone_file_of_an_older_version(name: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / name, STATE)
    with refused(str(tmp_path), f"holds {name}", f"resume={tmp_path / name}"):
        found(RunFolder(tmp_path), "auto")
    assert found(RunFolder(tmp_path), tmp_path / name) == tmp_path / name


@pytest.mark.parametrize(
    "held", ["checkpoint-0001-000000.pth", "last.pth", "best.pth", "metrics.jsonl", "config.yaml"]
)
def test_folder_that_holds_a_run_is_not_started_anew(held: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    folder = RunFolder(tmp_path / "out")
    assert found(folder, "") is None
    (tmp_path / "out/notes.txt").touch()
    assert found(folder, "") is None
    (tmp_path / "out" / held).touch()
    for given in ("", tmp_path / "a.pth", tmp_path / "out-2" / "checkpoint-0001-000000.pth"):
        with refused(f"out={str(tmp_path / 'out')!r}", "already holds a run", "resume=auto", "another out"):
            found(folder, given)


def test_checkpoint_of_another_run_may_begin_an_empty_folder(tmp_path: Path) -> None:
    run(tmp_path / "old", 1)
    for given in ("checkpoint-0001-000000.pth", "last.pth"):
        assert found(run(tmp_path / "new"), tmp_path / "old" / given) == tmp_path / "old" / given
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("out", ["out", "./out", "sub/../out", "link"])
def test_path_inside_is_found_under_the_name_that_the_folder_has_for_it(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("out")
    run(tmp_path / "out", 1, 2, 3)
    folder = RunFolder(Path(out))
    for given, epoch in [("checkpoint-0002-000000.pth", 2), ("last.pth", 3), ("best.pth", 1)]:
        for where in ("out", "link", tmp_path / "out"):
            path = found(folder, Path(where) / given)
            assert path == folder.file(epoch, 0)
            assert path in folder.files()
    (tmp_path / "last.pth").symlink_to(folder.file(1, 0).resolve())  # from elsewhere, and not to the last one
    assert found(folder, tmp_path / "last.pth") == folder.file(1, 0)


@pytest.mark.parametrize("disk", ["hard links", "copies"])
def test_last_and_best_are_found_under_their_own_names_without_links(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_without(monkeypatch, *DISKS[disk])
    folder = RunFolder(tmp_path)
    for epoch in (1, 2, 3):
        folder.add(folder.file(epoch, 0), STATE | {"epoch": epoch}, keep=99, best=epoch == 2)
    for given, epoch in [("auto", 3), (tmp_path / "last.pth", 3), (tmp_path / "best.pth", 2)]:
        assert found(folder, given) == folder.file(epoch, 0)
    for path in folder.files():
        path.unlink()
    with refused("holds last.pth but no checkpoint", f"resume={tmp_path / 'last.pth'}"):
        found(folder, "auto")
    assert found(folder, tmp_path / "best.pth") == tmp_path / "best.pth"


# ---- what may differ

FACTS = {"processes": 2, "device": "cpu", "training_images": "80 (abc)", "validation_images": "7 (def)"}


def written_by(config: Config, update: int = 0) -> dict[str, Any]:
    """A checkpoint, as far as it is looked at here."""
    progress = {"epoch": 3, "update": update}
    return dict.fromkeys(resume.KEYS) | {"args": to_dict(config), "facts": dict(FACTS), "progress": progress}


OTHER: dict[type, Any] = {
    type(None): lambda old: 7,
    bool: lambda old: not old,
    int: lambda old: old + 1,
    float: lambda old: old + 0.5,
    str: lambda old: old + "x",
    tuple: lambda old: (*old[:-1], old[-1] / 2),
    dict: lambda old: old | {"x": 1},
}


def with_changed(config: Config, knob: str) -> Config:
    """A copy in which that knob has another value of its type, sensible or not."""
    changed = from_dict(to_dict(config), "test")
    *section, key = knob.split(".")
    owner: Any = getattr(changed, section[0]) if section else changed
    old = getattr(owner, key)
    setattr(owner, key, OTHER[type(old)](old))
    return changed


KNOBS = sorted(flatten(to_dict(micro_config())))
PATH = Path("out/checkpoint-0001-000000.pth")


def check(before: Config, after: Config, **facts: Any) -> None:
    resume.refuse_changes(written_by(before), after, FACTS | facts, PATH)


def test_knobs_that_may_change_are_these() -> None:
    """Written out again, so that nobody frees a knob by a slip."""
    assert {
        *("out", "resume", "allow_change", "model.checkpoint", "model.checkpoint_ema", "model.new_head"),
        *("model.pretrained", "data.root", "data.download", "data.workers", "data.pin_memory"),
        *("data.max_unreadable", "run.device", "run.cudnn_benchmark", "run.tune", "run.max_skips", "run.log_every"),
        *("save.every", "save.keep", "save.max_failures", "watch.tensorboard", "watch.wandb"),
    } == resume.FREE
    assert {"out", "resume", "model.checkpoint", "data.root", "data.workers", "data.pin_memory"} == resume.LOCAL
    assert {"training_images", "optim.global_batch", "seed"} == resume.ORDER
    assert {"processes", "optim.batch_per_device", "data.workers"} == resume.SHARD_ORDER


def test_whatever_the_numbers_of_a_run_depend_on_is_not_free() -> None:
    sections = ("augment.", "optim.", "ema.")
    single = {"epochs", "seed", "run.precision", "run.tf32", "data.dataset", "data.train_split", "data.val_split"}
    model = {"model.name", "model.kwargs", "model.num_classes", "model.img_size", "model.drop", "model.drop_path"}
    pixels = {
        f"data.{key}" for key in ("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "upright")
    }
    bound = {knob for knob in KNOBS if knob.startswith(sections)} | single | model | pixels
    assert bound <= set(KNOBS)
    assert not bound & resume.FREE


def test_unchanged_run_goes_on() -> None:
    check(micro_config(), micro_config())


@pytest.mark.parametrize("knob", KNOBS)
def test_knob_may_change_only_if_it_is_free_or_allowed(knob: str) -> None:
    before = micro_config()
    after = with_changed(before, knob)
    old, new = (flatten(to_dict(config))[knob] for config in (before, after))
    assert old != new
    if knob in resume.FREE:
        if knob != "allow_change":
            check(before, after)
        return
    with refused(f"resume={str(PATH)!r}", f"{knob}={old}, now it is {new}", f"allow_change={knob} ", "model.check"):
        check(before, after)
    for allowed in (knob, knob.split(".")[0], f" epochs , {knob},seed"):
        after.allow_change = allowed
        check(before, after)
    after.allow_change = "data.mean" if knob != "data.mean" else "data.std"
    with refused(knob):
        check(before, after)


@pytest.mark.parametrize(("fact", "value"), [("processes", 3), ("device", "cuda"), ("training_images", 81)])
def test_what_else_the_numbers_depend_on_may_change_only_where_it_is_allowed(fact: str, value: Any) -> None:
    with refused(f"{fact}={FACTS[fact]}, now it is {value}", f"allow_change={fact} "):
        check(micro_config(), micro_config(), **{fact: value})
    check(micro_config(), micro_config(allow_change=fact), **{fact: value})


def test_workers_matter_to_the_order_of_shards_alone() -> None:
    for dataset, free in [("", True), ("torch/cifar10", True), ("wds/imagenet", False)]:
        before, after = (micro_config(**{"data.dataset": dataset, "data.workers": count}) for count in (2, 4))
        if free:
            check(before, after)
            continue
        with refused("data.workers=2, now it is 4", "allow_change=data.workers"):
            check(before, after)
        after.allow_change = "data.workers"
        check(before, after)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("optim.lrr", "did you mean 'optim.lr'?"),
        ("epochs,proceses", "did you mean 'processes'?"),
        ("optim.l", "no knob"),
        ("opti", "no knob"),
        ("#", "no knob"),
    ],
)
def test_change_of_an_unknown_knob_is_refused(text: str, hint: str) -> None:
    with refused(f"allow_change={text!r}", text.split(",")[-1], "no knob", hint):
        check(micro_config(), micro_config(allow_change=text))


def test_name_that_only_begins_like_a_knob_allows_nothing_else() -> None:
    with refused("optim.lr"):
        check(micro_config(), micro_config(allow_change="optim.layer_decay", **{"optim.lr": 1.0}))
    with refused("data.mean"):
        check(micro_config(), micro_config(allow_change="data.img_size", **{"data.mean": [0.0, 0.0, 0.0]}))


@pytest.mark.parametrize("key", sorted(resume.KEYS))
def test_checkpoint_without_what_a_run_needs_is_refused(key: str) -> None:
    state = written_by(micro_config())
    del state[key]
    with refused(f"resume={str(PATH)!r}", f"lacks {key};", "model.checkpoint"):
        resume.refuse_changes(state, micro_config(), FACTS, PATH)


def test_knob_that_is_newer_than_the_checkpoint_had_its_default() -> None:
    state = written_by(micro_config())
    del state["args"]["optim"]["eps"]
    resume.refuse_changes(state, micro_config(), FACTS, PATH)
    with refused("optim.eps=1e-08, now it is 1e-06"):
        resume.refuse_changes(state, micro_config(**{"optim.eps": 1e-6}), FACTS, PATH)


@pytest.mark.parametrize("knob", ["optim.global_batch", "seed"])
def test_order_of_an_epoch_cannot_change_in_its_middle(knob: str) -> None:
    before = micro_config()
    after = with_changed(before, knob)
    after.allow_change = knob
    resume.refuse_changes(written_by(before, update=0), after, FACTS, PATH)
    with refused(str(PATH), "middle of an epoch", knob, "checkpoint-*-000000.pth"):
        resume.refuse_changes(written_by(before, update=2), after, FACTS, PATH)


def test_shares_of_shards_cannot_change_in_the_middle_of_an_epoch() -> None:
    for dataset, free in [("synthetic", True), ("wds/toy", False)]:
        before = micro_config(**{"data.dataset": dataset})
        after = with_changed(before, "optim.batch_per_device")
        after.allow_change = "optim.batch_per_device,processes"
        facts = FACTS | {"processes": 3}
        if free:
            resume.refuse_changes(written_by(before, update=2), after, facts, PATH)
        else:
            with refused("middle of an epoch"):
                resume.refuse_changes(written_by(before, update=2), after, facts, PATH)


def test_knobs_that_decide_when_processes_meet_are_compared_and_places_are_not() -> None:
    compared = resume.shared_knobs(micro_config())
    assert {"optim.lr", "seed", "save.every", "run.log_every", "run.max_skips", "save.max_failures"} <= compared.keys()
    assert not {"out", "data.root", "data.workers"} & compared.keys()
