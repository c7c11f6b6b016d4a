"""Checkpoints: written whole or not at all, read without running code, refused in one line where they do not fit."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused, small_model
from timm.models import load_checkpoint

from sgconvnext import checkpoint

STATE = {"state_dict": {"weight": torch.arange(4.0)}, "epoch": 3, "args": {"out": "runs/x", "betas": [0.9, 0.999]}}


def same_weights(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    checkpoint.save(path, STATE)
    state = checkpoint.load(path)
    assert same_weights(state.pop("state_dict"), STATE["state_dict"])
    assert state == {key: STATE[key] for key in ("epoch", "args")}
    assert [item.name for item in tmp_path.iterdir()] == ["last.pth"]


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
    assert [item.name for item in tmp_path.iterdir()] == ["last.pth"]


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
    for path in (tmp_path / "none.pth", tmp_path):
        with refused(repr(str(path)), "does not exist", ".pth"):
            checkpoint.load(path)


@pytest.mark.parametrize("content", [{"model": {}}, {"weight": torch.zeros(1)}, [1], torch.zeros(2)], ids=str)
def test_file_of_another_program_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with refused("a.pth", "no 'state_dict'", "train.py"):
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
    with refused("'a.pth'", "shaped differently", "stem.0.weight", ", ..."):
        checkpoint.load_weights(model, small_model(dims=(12, 16, 24, 32)).state_dict(), "a.pth")
    with refused("unexpected", "stages.2.blocks.1.", ", ..."):
        checkpoint.load_weights(model, small_model(depths=(1, 1, 2, 1)).state_dict(), "a.pth")
    with refused(f"{len(before)} missing"):
        checkpoint.load_weights(model, {}, "a.pth")
    assert same_weights(model.state_dict(), before)


def test_kernels_of_another_image_size_are_refused() -> None:
    with refused("shaped differently", "sgconv"):
        checkpoint.load_weights(small_model(), small_model(img_size=96).state_dict(), "a.pth")


def test_new_head_leaves_out_the_classifier_alone() -> None:
    model, source = small_model(num_classes=3), small_model(num_classes=10)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    with refused("2 shaped differently (head.fc.weight, head.fc.bias)"):
        checkpoint.load_weights(model, source.state_dict(), "a.pth")
    checkpoint.load_weights(model, source.state_dict(), "a.pth", skip="head.fc")
    for key, value in model.state_dict().items():
        assert torch.equal(value, own[key] if key.startswith("head.fc.") else source.state_dict()[key]), key
    without_stem = {key: value for key, value in source.state_dict().items() if not key.startswith("stem.")}
    with refused("4 missing (stem.0.weight"):
        checkpoint.load_weights(model, without_stem, "a.pth", skip="head.fc")
    equal = small_model()
    own_head = equal.head.fc.weight.clone()
    checkpoint.load_weights(equal, source.state_dict(), "a.pth", skip="head.fc")  # also where the shapes would fit
    assert torch.equal(equal.head.fc.weight, own_head)


@pytest.mark.parametrize("ema", [False, True])
def test_timm_reads_the_file(ema: bool, tmp_path: Path) -> None:
    source, average, model = small_model(), small_model(), small_model()
    state = {"state_dict": source.state_dict(), "state_dict_ema": average.state_dict(), "version": checkpoint.VERSION}
    checkpoint.save(tmp_path / "last.pth", STATE | state)
    load_checkpoint(model, str(tmp_path / "last.pth"), use_ema=ema)
    assert same_weights(model.state_dict(), (average if ema else source).state_dict())
