"""Checkpoints: written whole or not at all, read without running code, refused in one line where they do not fit."""

import errno
import hashlib
import io
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused, small_model
from timm.models import load_checkpoint

from sgconvnext.training import checkpoint
from sgconvnext.training.checksum import checksum_of

STATE = {"state_dict": {"weight": torch.arange(4.0)}, "epoch": 3, "args": {"out": "runs/x", "betas": [0.9, 0.999]}}


def same_weights(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    checkpoint.save(path, STATE)
    state = checkpoint.load(path)
    assert same_weights(state.pop("state_dict"), STATE["state_dict"])
    assert state == {key: STATE[key] for key in ("epoch", "args")}
    assert names(tmp_path) == ["last.pth", "last.pth.sha256"]


def test_crash_while_writing_leaves_the_old_checkpoint_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pth"
    checkpoint.save(path, STATE)
    before = path.read_bytes()

    def crash(state: Any, file: Any) -> None:
        file.write(before[: len(before) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, STATE | {"epoch": 4})
    assert path.read_bytes() == before
    monkeypatch.undo()
    checkpoint.save(path, STATE | {"epoch": 5})  # whatever the crash left behind is in nobody's way
    assert checkpoint.load(path)["epoch"] == 5
    assert names(tmp_path) == ["last.pth", "last.pth.sha256"]


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return Path.touch, (Path("harm"),)  # type: ignore[return-value]


def test_checkpoint_is_read_without_running_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(STATE | {"args": Harmful()}, tmp_path / "bad.pth")
    with refused("bad.pth", "cannot be read"):
        checkpoint.load(tmp_path / "bad.pth")
    assert not (tmp_path / "harm").exists()


def damaged(kind: str, path: Path) -> None:
    torch.save(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": whole[: len(whole) // 2],
            "beginning": whole[:100],
            "text": b"epochs: 300\n",
            "zeros": bytes(1000),
            "pickle": pickle.dumps(Harmful),
        }[kind]
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("kind", ["empty", "truncated", "beginning", "text", "zeros", "pickle"])
def test_damaged_file_is_refused(kind: str, tmp_path: Path) -> None:
    damaged(kind, tmp_path / "a.pth")
    with refused("a.pth", "cannot be read"):
        checkpoint.load(tmp_path / "a.pth")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with refused(repr(str(tmp_path / "none.pth")), "does not exist", ".pth"):
        checkpoint.load(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": {}}, "no 'state_dict' or 'model' with weights, but 'model'; name a file written by train.py"),
        ({"epoch": 3, "net": {"a": 1}}, "but 'epoch', 'net'; name"),
        ({}, "but nothing; name"),
        ([1], "holds a list, not weights by name; use another"),
        (torch.zeros(2), "holds a Tensor, not weights by name; use another"),
    ],
    ids=str,
)
def test_file_of_another_program_is_refused(content: Any, told: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with refused("a.pth", told):
        checkpoint.load(tmp_path / "a.pth")


def test_empty_weights_are_not_blamed_on_the_average() -> None:
    with pytest.raises(ValueError, match=r"^(?!.*EMA).*a\.pth"):
        checkpoint.weights({"state_dict": {}}, False, "a.pth")


def test_weights_and_their_average_are_told_apart() -> None:
    state = {"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}}
    assert same_weights(checkpoint.weights(state, False, "a.pth"), state["state_dict"])
    assert same_weights(checkpoint.weights(state, True, "a.pth"), state["state_dict_ema"])


@pytest.mark.parametrize("state", [STATE, STATE | {"state_dict_ema": None}], ids=["absent", "none"])
def test_checkpoint_without_an_average_is_refused_where_it_is_asked_for(state: dict[str, Any]) -> None:
    with refused("'a.pth'", "no EMA weights", "ema.decay=0"):
        checkpoint.weights(state, True, "a.pth")


def test_weights_are_loaded_into_a_model_of_the_same_architecture() -> None:
    source, model = small_model(), small_model()
    assert not same_weights(model.state_dict(), source.state_dict())
    checkpoint.load_weights(model, source.state_dict(), "a.pth")
    assert same_weights(model.state_dict(), source.state_dict())


def test_another_architecture_is_refused_with_the_keys_that_differ() -> None:
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    renamed = {("old." if key == "stem.0.bias" else "") + key: value for key, value in before.items()}
    with refused("'a.pth'", "another architecture", "1 missing (stem.0.bias)", "1 unexpected (old.stem.0.bias)"):
        checkpoint.load_weights(model, renamed, "a.pth")
    with refused("'a.pth'", "another size", "dims [12, 16, 24, 32]", "dims [8, 16, 24, 32]"):
        checkpoint.load_weights(model, small_model(dims=(12, 16, 24, 32)).state_dict(), "a.pth")
    with refused("another size", "depths [1, 1, 2, 1]", "depths [1, 1, 1, 1]"):
        checkpoint.load_weights(model, small_model(depths=(1, 1, 2, 1)).state_dict(), "a.pth")
    with refused("'a.pth' has no weights for this model"):
        checkpoint.load_weights(model, {}, "a.pth")
    assert same_weights(model.state_dict(), before)


def test_kernels_of_another_image_size_are_refused() -> None:
    with refused("kernels for another image size", "5 scales of 36 taps, the model 5 of 16", "model.img_size"):
        checkpoint.load_weights(small_model(), small_model(img_size=96).state_dict(), "a.pth")


def test_new_head_leaves_out_the_classifier_alone() -> None:
    model, source = small_model(num_classes=3), small_model(num_classes=10)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    with refused("a classifier (head.fc.weight) of 10 classes, the model of 3; model.new_head=true"):
        checkpoint.load_weights(model, source.state_dict(), "a.pth")
    checkpoint.load_weights(model, source.state_dict(), "a.pth", skip=["head.fc"])
    for key, value in model.state_dict().items():
        assert torch.equal(value, own[key] if key.startswith("head.fc.") else source.state_dict()[key]), key
    without_stem = {key: value for key, value in source.state_dict().items() if not key.startswith("stem.")}
    with refused("4 missing (stem.0.weight"):
        checkpoint.load_weights(model, without_stem, "a.pth", skip=["head.fc"])
    equal = small_model()
    own_head = equal.head.fc.weight.clone()
    checkpoint.load_weights(equal, source.state_dict(), "a.pth", skip=["head.fc"])  # also where the shapes would fit
    assert torch.equal(equal.head.fc.weight, own_head)


@pytest.mark.parametrize("ema", [False, True])
def test_timm_reads_the_file(ema: bool, tmp_path: Path) -> None:
    source, average, model = small_model(), small_model(), small_model()
    state = {"state_dict": source.state_dict(), "state_dict_ema": average.state_dict(), "version": checkpoint.VERSION}
    checkpoint.save(tmp_path / "last.pth", STATE | state)
    load_checkpoint(model, str(tmp_path / "last.pth"), use_ema=ema)
    assert same_weights(model.state_dict(), (average if ema else source).state_dict())


# ---- the checksum


def test_checksum_is_what_sha256sum_writes_and_checks(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a b.pth", STATE)
    sha256 = hashlib.sha256((tmp_path / "a b.pth").read_bytes()).hexdigest()
    assert (tmp_path / "a b.pth.sha256").read_bytes() == f"{sha256}  a b.pth\n".encode()
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "a b.pth.sha256"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_flipped_bit_is_refused_wherever_it_is(place: float, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    checkpoint.save(path, STATE)
    for file in (path, checksum_of(path)):
        whole = file.read_bytes()
        number = int(place * len(whole)) if file == path else int(place * 64)
        file.write_bytes(whole[:number] + bytes([whole[number] ^ 16]) + whole[number + 1 :])
        with refused("a.pth", "damaged", "a.pth.sha256", "use another"):
            checkpoint.load(path)
        file.write_bytes(whole)
    assert checkpoint.load(path)["epoch"] == 3


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_file_that_is_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with refused("a.pth", "damaged"):
        checkpoint.load(path)


def test_link_is_checked_against_the_checksum_of_its_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pth", STATE)
    (tmp_path / "last.pth").symlink_to("a.pth")
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 3
    checksum_of(tmp_path / "a.pth").write_text(f"{'0' * 64}  a.pth\n")
    with refused("last.pth", "damaged", "a.pth.sha256"):
        checkpoint.load(tmp_path / "last.pth")


def test_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pth", STATE)
    checksum_of(tmp_path / "a.pth").unlink()
    assert checkpoint.load(tmp_path / "a.pth")["epoch"] == 3


# ---- a disk that is full

LARGE = STATE | {"state_dict": {"weight": torch.arange(20000.0)}}  # more than a file's buffer


def leave_room(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Only so many bytes more can be written to any file; what is still in a buffer does not count."""
    left = [room]
    opened: Any = Path.open

    class Raw(io.FileIO):
        def write(self, content: Any) -> int:
            size = memoryview(content).nbytes
            if size > left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= size
            return super().write(content)

    def limited(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return io.BufferedWriter(Raw(path, "wb")) if mode == "wb" else opened(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", limited)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("overwritten", [False, True])
@pytest.mark.parametrize("short", [None, 80000, 40000, 1000, 1, -10], ids=str)  # -10: the checksum does not fit
def test_full_disk_leaves_the_folder_as_it_was(
    short: int | None, overwritten: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    checkpoint.save(path, LARGE)
    size = path.stat().st_size
    if not overwritten:
        path = tmp_path / "b.pth"
    before = contents(tmp_path)
    leave_room(monkeypatch, 0 if short is None else size - short)
    with pytest.raises(OSError, match=rf"checkpoint '.*{path.name}' cannot be written: .*No space left") as caught:
        checkpoint.save(path, LARGE | {"epoch": 4})
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    checkpoint.save(path, LARGE | {"epoch": 4})
    assert checkpoint.load(path)["epoch"] == 4


def test_as_much_room_as_the_files_need_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "a.pth", LARGE)
    leave_room(monkeypatch, sum(len(content) for content in contents(tmp_path).values()))
    checkpoint.save(tmp_path / "b.pth", LARGE)
    assert checkpoint.load(tmp_path / "b.pth")["epoch"] == 3


@pytest.mark.parametrize("overwritten", [False, True])
def test_rename_that_fails_leaves_the_folder_as_it_was(
    overwritten: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    if overwritten:
        checkpoint.save(path, STATE)
    before, replace = contents(tmp_path), Path.replace

    def fails(source: Path, target: Path) -> Path:
        if target == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match=r"checkpoint '.*a\.pth' cannot be written: .*Input/output error"):
        checkpoint.save(path, STATE | {"epoch": 4})
    assert contents(tmp_path) == before


def test_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"checkpoint '.*gone/a\.pth' cannot be written: .*No such file"):
        checkpoint.save(tmp_path / "gone" / "a.pth", STATE)
