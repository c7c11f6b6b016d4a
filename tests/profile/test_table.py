"""The same rows in every style, with what they were measured on."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch

from sgconvnext.profile import table
from sgconvnext.profile.table import STYLES, Table, device_name, environment, render

FACTS = {"device": "abacus", "threads": 2, "command": "python -m sgconvnext.profile flops a|b"}
TABLE = Table(
    "Beads",
    {"model": "", "parameters": ",d", "ms": ".2f"},
    [{"model": "a", "parameters": 1234567, "ms": 0.5, "seconds": [1, 2]}, {"model": "long_name", "ms": 12.345}],
    ["ms: of a bead."],
)


def test_plain_table_aligns_numbers_to_the_right() -> None:
    assert render([TABLE], FACTS, "table") == (
        "Beads\n"
        "model      parameters     ms\n"
        "---------  ----------  -----\n"
        "a           1,234,567   0.50\n"
        "long_name           -  12.35\n"
        "ms: of a bead.\n\n"
        "device abacus, threads 2: `python -m sgconvnext.profile flops a|b`\n"
    )


def test_markdown_has_one_row_of_cells_per_row() -> None:
    assert render([TABLE], FACTS, "markdown") == (
        "**Beads**\n\n"
        "| model | parameters | ms |\n"
        "| --- | ---: | ---: |\n"
        "| a | 1,234,567 | 0.50 |\n"
        "| long_name | - | 12.35 |\n\n"
        "ms: of a bead.\n\n"
        "device abacus, threads 2: `python -m sgconvnext.profile flops a|b`\n"
    )


def test_csv_reads_back_with_comments_left_out() -> None:
    text = render([TABLE], FACTS, "csv")
    rows = list(csv.DictReader(line for line in io.StringIO(text) if not line.startswith("#") and line.strip()))
    assert rows[0] == {"model": "a", "parameters": "1234567", "ms": "0.5"}
    assert rows[1] == {"model": "long_name", "parameters": "", "ms": "12.345"}
    for said in ("# device: abacus", "# command: python -m", "# Beads", "# ms: of a bead."):
        assert said in text


def test_json_has_full_precision_every_round_and_the_environment() -> None:
    found = json.loads(render([TABLE, TABLE], FACTS, "json"))
    assert found["environment"] == FACTS
    assert len(found["tables"]) == 2
    assert found["tables"][0]["rows"] == TABLE.rows


def test_environment_names_device_versions_threads_and_command() -> None:
    facts = environment(torch.device("cpu"), "python -m sgconvnext.profile ops", dtype="bf16 autocast")
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device"] == device_name(torch.device("cpu")) != ""
    assert {"timm", "python", "sgconvnext"} <= set(facts)
    assert facts["dtype"] == "bf16 autocast"
    assert list(facts)[-1] == "command"


@pytest.mark.parametrize("style", STYLES)
def test_every_style_ends_with_a_line_break(style: str) -> None:
    assert render([TABLE], FACTS, style).endswith("\n")


def test_driver_is_named_where_nvidia_smi_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "driver, power limit, top clock" not in table._driver()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '580.1, 700.00 W, 1980 MHz'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert table._driver()["driver, power limit, top clock"] == "580.1, 700.00 W, 1980 MHz"
