"""Tables that say what they were measured on: for people, as Markdown, CSV or JSON."""

import csv
import importlib.metadata
import importlib.util
import io
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from .. import __version__


@dataclass
class Table:
    """Rows under headings.

    Args:
        title: one line.
        columns: heading to format of its numbers ("" for text); a row may lack a column.
        rows: heading to value.
        notes: what a reader must know to believe the numbers, a sentence each.
    """

    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """Every row as text."""
        return [[_text(row.get(name), spec) for name, spec in self.columns.items()] for row in self.rows]


def _text(value: Any, spec: str) -> str:
    if value is None:
        return "-"
    return format(value, spec) if isinstance(value, int | float) else str(value)


def environment(device: torch.device, command: str, **more: Any) -> dict[str, Any]:
    """What numbers depend on: hardware, versions, threads, command, and whatever else the caller knows.

    Args:
        device: that was measured.
        command: which repeats it.
        more: further facts, such as the dtype.
    """
    facts: dict[str, Any] = {"device": device_name(device)}
    if device.type == "cuda":
        cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "tf32": _tf32()}
        facts |= cuda | _driver() | {"cpu": device_name(torch.device("cpu"))}
    facts["threads"] = torch.get_num_threads()
    versions = {"sgconvnext": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return facts | versions | {"python": platform.python_version()} | more | {"command": command}


def _tf32() -> str:
    return "on" if torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32 else "off"


def _driver() -> dict[str, str]:
    """The version of triton, and what nvidia-smi says of the GPU, where they are installed."""
    found = {"triton": importlib.metadata.version("triton")} if importlib.util.find_spec("triton") else {}
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return found  # CUDA runs without it
    return found | {"driver, power limit, top clock": " | ".join(said.splitlines())}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def render(tables: Sequence[Table], facts: dict[str, Any], style: str) -> str:
    """All tables and, once, what they were measured on.

    Args:
        tables: at least one.
        facts: of `environment`.
        style: one of STYLES.
    """
    return STYLES[style](tables, facts)


def _plain(tables: Sequence[Table], facts: dict[str, Any]) -> str:
    return "\n\n".join([*map(_plain_table, tables), _facts(facts)]) + "\n"


def _plain_table(table: Table) -> str:
    lines = [list(table.columns), *table.cells()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = list(table.columns.values())
    text = [
        "  ".join(
            cell.rjust(width) if spec else cell.ljust(width)
            for cell, width, spec in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([table.title, *text, *table.notes])


def _markdown(tables: Sequence[Table], facts: dict[str, Any]) -> str:
    blocks = []
    for table in tables:
        rule = ["---:" if spec else "---" for spec in table.columns.values()]
        lines = ["| " + " | ".join(line) + " |" for line in (list(table.columns), rule, *table.cells())]
        blocks += [f"**{table.title}**", "\n".join(lines), *table.notes]
    return "\n\n".join([*blocks, _facts(facts)]) + "\n"


def _facts(facts: dict[str, Any]) -> str:
    *others, (_, command) = facts.items()
    return f"{', '.join(f'{name} {value}' for name, value in others)}: `{command}`"


def _csv(tables: Sequence[Table], facts: dict[str, Any]) -> str:
    """Comments begin with #; tables are apart by an empty line."""
    blocks = ["".join(f"# {name}: {value}\n" for name, value in facts.items())]
    for table in tables:
        text = io.StringIO()
        text.writelines(f"# {line}\n" for line in (table.title, *table.notes))
        writer = csv.DictWriter(text, list(table.columns), lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table.rows)
        blocks.append(text.getvalue())
    return "\n".join(blocks)


def _json(tables: Sequence[Table], facts: dict[str, Any]) -> str:
    found = [{"title": table.title, "rows": table.rows, "notes": table.notes} for table in tables]
    return json.dumps({"environment": facts, "tables": found}, indent=2) + "\n"


STYLES = {"table": _plain, "markdown": _markdown, "csv": _csv, "json": _json}
