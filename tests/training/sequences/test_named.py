"""data.dataset=sequence/NAME: each name gives what its dataset gives, and every wrong knob is told."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import refused
from training_helpers import CONFIGS, alone, micro_config, training

from sgconvnext.errors import DataError
from sgconvnext.models.kernel import KERNEL_DEFAULTS
from sgconvnext.training import data, engine, preflight
from sgconvnext.training.config import Config, load_config
from sgconvnext.training.images import UNREADABLE, collate_readable
from sgconvnext.training.recorded_model import RecordedModel
from sgconvnext.training.sequences import named
from sgconvnext.training.sequences.named import OPENERS, Sequences, open_sequences

MADE = {"data.train_samples": 12, "data.val_samples": 6}


def config(name: str, **changes: Any) -> Config:
    return micro_config(**{"data.dataset": f"sequence/{name}", "model.num_classes": None} | changes)


def write_text(folder: Path) -> str:
    for i in range(30):
        (folder / f"{i}.txt").write_bytes(bytes([65 + i]) * (40 + i))
    return str(folder)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("name", "kwargs", "shape", "classes"),
    [
        ("listops", {"lengths": [5, 30]}, (30,), 10),
        ("pathfinder", {"size": 32}, (1024,), 2),
        ("pathfinder", {"tokens": False, "path_length": 9}, (1, 1024), 2),
        ("digits", {}, (64,), 10),
        ("digits", {"tokens": False}, (1, 64), 10),
    ],
)
def test_sequences_of_a_name_have_their_shape_and_classes(
    name: str, kwargs: dict[str, Any], shape: tuple[int, ...], classes: int, train: bool
) -> None:
    chosen = config(name, **MADE, **{"data.kwargs": kwargs})
    split = data.create_split(chosen, train)
    assert len(split) == {"digits": (360, 1437)[train]}.get(name, (6, 12)[train])
    sample = split.dataset[0]
    assert sample.image is not None
    assert sample.image.shape == shape
    assert sample.image.is_floating_point() == ("tokens" in kwargs)
    assert data.num_classes(split, split, None) == classes
    again = data.create_split(chosen, train)
    assert torch.equal(split.dataset[0].image, again.dataset[0].image)


def test_text_is_for_a_language_model_of_bytes(tmp_path: Path) -> None:
    chosen = config("text", **{"data.root": write_text(tmp_path), "data.kwargs": {"length": 16}})
    train, val = (data.create_split(chosen, each) for each in (True, False))
    assert data.num_classes(train, val, None) == 256
    loader = data.create_eval_loader(val, chosen, alone())
    batch = next(iter(loader))
    assert batch.images.shape == batch.targets.shape == (min(16, len(val)), 16)
    assert torch.equal(batch.images[0, 1:], batch.targets[0, :-1])


def test_loss_and_accuracy_of_a_language_model_are_over_its_tokens(tmp_path: Path) -> None:
    class Next(torch.nn.Module):
        """Says that every byte follows itself, but for odd bytes, which it takes for 0."""

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            guess = torch.where(tokens % 2 == 1, torch.zeros_like(tokens), tokens)
            return 10.0 * torch.nn.functional.one_hot(guess, 256).float()

    chosen = config("text", **{"data.root": write_text(tmp_path), "data.kwargs": {"length": 16}})
    split = data.create_split(chosen, False)
    found = engine.evaluate(Next(), data.create_eval_loader(split, chosen, alone()), chosen, alone())
    pairs = [split.dataset[i] for i in range(len(split))]
    tokens, targets = torch.stack([p.image for p in pairs]), torch.stack([p.target for p in pairs])
    logits = Next()(tokens)
    assert found is not None
    assert found["count"] == len(split)
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(-1) == targets).float().mean()))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert found["loss"] == pytest.approx(float(loss))


def test_published_layouts_have_their_own_names_of_the_splits(tmp_path: Path) -> None:
    for name, title in (("train", "One"), ("valid", "Two")):
        (tmp_path / f"wiki.{name}.tokens").write_bytes(f" \n = {title} = \n \n some words here \n".encode())
    wiki = config("wikitext", **{"data.root": str(tmp_path), "data.kwargs": {"length": 8}})
    texts = [bytes(data.create_split(wiki, train).dataset.source.text.tolist()) for train in (True, False)]
    assert b"One" in texts[0]
    assert b"Two" in texts[1]
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n( [MAX 4 ) 3 ] )\t4\n")
    (tmp_path / "basic_val.tsv").write_text("Source\tTarget\n( [MIN 4 ) 3 ] )\t3\n")
    lra = config("lra_listops", **{"data.root": str(tmp_path), "data.kwargs": {"length": 8}})
    assert [data.create_split(lra, train).dataset[0].target for train in (True, False)] == [4, 3]


def test_file_that_cannot_be_read_is_counted_and_named() -> None:
    class Source:
        files = ("a.wav", "b.wav")

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index:
                raise DataError("b.wav is no wav file")
            return torch.zeros(1, 4), 3

    dataset = Sequences(Source(), "")
    batch = collate_readable([dataset[0], dataset[1]])
    assert batch.faults.tolist() == [0, UNREADABLE]
    assert batch.targets.tolist() == [3]
    assert dataset.name(1) == "b.wav"


def test_digest_tells_data_apart(tmp_path: Path) -> None:
    chosen = config("listops", **MADE, **{"data.kwargs": {"lengths": [5, 30]}})
    seeds = [{"lengths": [5, 30], "seed": seed} for seed in (1, 2)]
    same, other = (
        open_sequences(config("listops", **MADE, **{"data.kwargs": each}), True)[0].digest() for each in seeds
    )
    assert same != other
    assert open_sequences(chosen, True)[0].digest() == open_sequences(chosen, True)[0].digest()
    text = {"data.root": write_text(tmp_path), "data.kwargs": {"length": 16}}
    before = open_sequences(config("text", **text), True)[0].digest()
    for i in range(30):
        (tmp_path / f"{i}.txt").write_bytes(bytes([97 + i]) * (40 + i))
    assert open_sequences(config("text", **text), True)[0].digest() != before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.dataset": "sequence/listop"}, ("'sequence/listop' is unknown", "listops")),
        ({}, ("made on the spot", "data.train_samples")),
        ({**MADE, "data.kwargs": {"length": 4}}, ("'length'", "lengths, depth")),
        ({**MADE, "data.kwargs": {"lengths": 4}}, ("lengths=4", "two whole numbers")),
        ({"augment.mixup": 0.8}, ("augment.mixup=0.8", "images")),
        ({"augment.cutmix": 1.0}, ("augment.cutmix=1.0", "images")),
        ({"model.channels_last": True}, ("model.channels_last=True", "images")),
        ({"run.tune": True}, ("run.tune=True", "images")),
        ({"augment.auto_augment": "rand-m9"}, ("augment.auto_augment", "images")),
        ({"data.val_split": "test"}, ("data.val_split='test'", "train and val")),
        ({"data.dataset": "sequence/digits", "data.kwargs": {"tokens": 3}}, ("tokens=3", "True or False")),
        ({"data.dataset": "sequence/speech", "data.kwargs": {"words": "left"}}, ("words='left'", "list")),
        ({"data.dataset": "sequence/speech", "data.kwargs": {"words": [True]}}, ("words=[True]", "quotes")),
        ({"data.dataset": "sequence/text", "data.root": "/nowhere"}, ("/nowhere",)),
        ({"data.dataset": "sequence/speech", "data.root": "/nowhere"}, ("/nowhere",)),
    ],
    ids=str,
)
def test_wrong_knobs_are_told(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    chosen = {key: value for key, value in TREE_SAMPLES.items() if key not in changes}
    with refused(*words):
        open_sequences(config("listops", **(chosen | changes)), True)


TREE_SAMPLES = {"data.train_samples": None, "data.val_samples": None}


@pytest.mark.parametrize("path", sorted((CONFIGS / "sequences").glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_of_a_task_names_a_dataset_and_a_model_that_takes_it(path: Path) -> None:
    chosen = load_config(path)
    assert chosen.data.dataset.removeprefix(named.PREFIX) in OPENERS
    sgconv = chosen.model.kwargs.get("sgconv", {})
    assert set(sgconv) - {"heads", "glu", "scale_dim", "num_scales"} <= set(KERNEL_DEFAULTS)


def test_preflight_tells_the_kernels_of_a_network_for_sequences() -> None:
    model = timm.create_model("sequence_classifier", length=100, dim=8, layers="AC", attention_heads=2)
    assert preflight.kernels(model, 224) == ["kernels for 100 tokens in 2 directions, 2 scales of 64 taps"]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"vocabulary": 5}, ("sequence/digits", "out of range", "model.kwargs.vocabulary")),
        ({"length": 63}, ("sequence/digits", "64 tokens", "length=63")),
    ],
    ids=str,
)
def test_network_that_does_not_fit_the_tokens_is_told_before_the_first_update(
    kwargs: dict[str, Any], words: tuple[str, ...]
) -> None:
    small = {"length": 64, "dim": 8, "layers": "C"} | kwargs
    chosen = config("digits", **{"model.name": "sequence_classifier", "model.kwargs": small})
    dataset = data.create_split(chosen, True).dataset
    model = timm.create_model("sequence_classifier", num_classes=10, **small)
    with refused(*words):
        preflight.rehearse(training(chosen, model, images=dataset), (3, 32, 32))


@pytest.mark.parametrize("kwargs", [{"length": "abc"}, {"length": 12.5}, {"separator": 5}], ids=str)
def test_argument_of_another_type_is_told_in_one_line(kwargs: dict[str, Any], tmp_path: Path) -> None:
    with refused("data.kwargs", "sequence/text"):
        open_sequences(config("text", **{"data.root": write_text(tmp_path), "data.kwargs": kwargs}), True)


def test_null_takes_an_argument_back() -> None:
    split = data.create_split(config("listops", **MADE, **{"data.kwargs": {"lengths": [5, 30], "seed": None}}), True)
    assert split.dataset[0].image.shape == (30,)


def test_rehearsal_passes_over_files_that_cannot_be_read() -> None:
    class Source:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index < 37:
                raise DataError("damaged")
            return torch.zeros(64, dtype=torch.int64), 3

    small = {"length": 64, "dim": 8, "layers": "C"}
    chosen = config("digits", **{"model.name": "sequence_classifier", "model.kwargs": small})
    model = timm.create_model("sequence_classifier", num_classes=10, **small)
    assert "GiB" in preflight.rehearse(training(chosen, model, images=Sequences(Source(), "")), (3, 32, 32))


def test_defaults_of_a_network_for_sequences_may_be_stated() -> None:
    small: dict[str, Any] = {"length": 64, "dim": 8, "layers": "C"}
    model = timm.create_model("sequence_classifier", num_classes=10, **small)
    before = RecordedModel("sequence_classifier", small, 224)
    before.refuse_another(model, "sequence_classifier", small | {"post_norm": False, "attention_heads": 4}, "a.pth")
    with refused("post_norm=True"):
        before.refuse_another(model, "sequence_classifier", small | {"post_norm": True}, "a.pth")
