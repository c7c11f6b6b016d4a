"""ConvNeXt's weights by timm's own doors: hub, folders, files; every tag of timm, its configuration and licence."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import hub_folder, refused, relative_error, visible
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

from sgconvnext.models.sgconvnext import MODELS

SLOW = pytest.mark.end_to_end
GAP3 = [name for name in MODELS if name.endswith("_gap3")]


def cached(hub: Path, model: Any, repository: str) -> None:
    save_for_hf(model, str(hub_folder(hub, repository)), safe_serialization=True)


def assert_same(got: Any, want: Any, size: int) -> None:
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_error(got(x), want(x)) <= 1e-5


@pytest.mark.parametrize(
    "tag",
    [
        "atto.d2_in1k",
        "nano.in12k_ft_in1k",
        "nano.r384_ad_in12k",
        *(
            pytest.param(tag, marks=SLOW)
            for tag in (
                "tiny.fb_in1k",
                "tiny.fb_in22k",
                "tiny.fb_in22k_ft_in1k_384",
                "tiny.dinov3_lvd1689m",
                "tiny.eupe_lvd1689m",
                "base.clip_laion2b",
                "large_mlp.clip_laion2b_augreg",
            )
        ),
    ],
)
def test_every_kind_of_tag_loads_from_the_hubs_cache(tag: str, hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    size, _, name = tag.partition(".")
    source = visible(timm.create_model(f"convnext_{tag}"))
    cached(hub, source, f"timm/convnext_{tag}")
    got = timm.create_model(f"sgconvnext_{size}_gap3.{name}", pretrained=True).eval()
    assert_same(got, source, 96)
    config, theirs = got.pretrained_cfg, source.pretrained_cfg
    differ = {key for key in theirs if theirs[key] != config.get(key)}
    assert differ <= {"architecture"}
    assert resolve_model_data_config(got) == resolve_model_data_config(source)
    assert got.stages[0].blocks[0].sgconv.input_size == (theirs["input_size"][1] // 4, theirs["input_size"][2] // 4)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("sgconvnext")]
    if "dinov3" in tag or "eupe" in tag:
        assert len(told) == 1
        assert theirs["license"] in told[0]
    else:
        assert not told


def test_every_tag_of_timm_is_there_with_its_configuration() -> None:
    for name in GAP3:
        arch = name.removeprefix("sg").removesuffix("_gap3")
        tags = timm.list_pretrained(f"{arch}.*")
        assert timm.list_pretrained(f"{name}.*") == [tag.replace(arch, name) for tag in tags]
        assert tags, arch
        for tag in tags:
            theirs, ours = timm.get_pretrained_cfg(tag), timm.get_pretrained_cfg(tag.replace(arch, name))
            assert ours.architecture == name
            for key in ("hf_hub_id", "url", "tag", "input_size", "test_input_size", "num_classes", "mean", "license"):
                assert getattr(ours, key) == getattr(theirs, key), (tag, key)
        assert timm.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(arch).tag  # the default


def test_classes_channels_and_features_are_adapted_as_timm_does(hub: Path) -> None:
    source = visible(timm.create_model("convnext_atto.d2_in1k"))
    cached(hub, source, "timm/convnext_atto.d2_in1k")
    for arguments in ({"num_classes": 0}, {"num_classes": 7}, {"in_chans": 1, "num_classes": 0}, {"in_chans": 4}):
        want = timm.create_model("convnext_atto.d2_in1k", pretrained=True, **arguments).eval()
        got = timm.create_model("sgconvnext_atto_gap3.d2_in1k", pretrained=True, **arguments).eval()
        x = torch.randn(1, arguments.get("in_chans", 3), 64, 64)
        with torch.no_grad():
            assert relative_error(got.forward_features(x), want.forward_features(x)) <= 1e-5, arguments
        assert got(x).shape == want(x).shape
    got, want = (
        timm.create_model(f"{name}.d2_in1k", pretrained=True, features_only=True, output_stride=16).eval()
        for name in ("sgconvnext_atto_gap3", "convnext_atto")
    )
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        for a, b in zip(got(x), want(x), strict=True):
            assert relative_error(a, b) <= 1e-5


def test_folders_and_files_that_timm_wrote(tmp_path: Path, hub: Path) -> None:
    source = visible(timm.create_model("convnext_atto.d2_in1k", num_classes=10))
    folder = tmp_path / "theirs"
    save_for_hf(source, str(folder), safe_serialization=True)
    file = {"file": str(folder / "model.safetensors"), "num_classes": 10}
    got = timm.create_model("sgconvnext_atto_gap3", pretrained=True, pretrained_cfg_overlay=file).eval()
    assert_same(got, source, 64)
    save_for_hf(got, str(tmp_path / "ours"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    assert type(again) is type(got)
    assert_same(again, source, 96)
    cached(hub, got, "somebody/ours")
    assert_same(timm.create_model("hf-hub:somebody/ours", pretrained=True).eval(), source, 96)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.pth")
    file["file"] = str(tmp_path / "a.pth")
    assert_same(
        timm.create_model("sgconvnext_atto_gap3", pretrained=True, pretrained_cfg_overlay=file).eval(), source, 64
    )


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, hub: Path) -> None:
    def load(state: Any, name: str = "sgconvnext_atto_gap3") -> None:
        path = tmp_path / "a.safetensors"
        path.unlink(missing_ok=True)
        path.write_bytes(state) if isinstance(state, bytes) else save_file(state, path)
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 10})

    def state(name: str, **kwargs: Any) -> dict[str, Any]:
        return timm.create_model(name, num_classes=10, **kwargs).state_dict()

    with refused("sgconvnext_atto_gap3: the pretrained file", "another size", "dims [48, 96, 192, 384]"):
        load(state("convnext_femto"))
    with refused("the pretrained file", "ConvNeXt-V2", "response norm"):
        load(state("convnextv2_atto"))
    with refused("sgconvnext_atto: the pretrained file", "_gap3"):
        load(state("convnext_atto"), "sgconvnext_atto")
    with refused("cannot be read", "name a file of weights"):
        load(b"no weights")
    with refused("sgconvnext_atto_gap3: pretrained weights", "timm/convnext_atto.d2_in1k", "cannot be read"):
        timm.create_model("sgconvnext_atto_gap3.d2_in1k", pretrained=True)


def test_configuration_is_plain_json(tmp_path: Path) -> None:
    model = timm.create_model("sgconvnext_atto_gap3", num_classes=3)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architecture"] == "sgconvnext_atto_gap3"
    assert written["pretrained_cfg"]["license"] == "apache-2.0"
