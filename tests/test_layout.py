"""The dependencies between the folders of the package are those that docs/layout.md allows."""

import ast
import importlib.util

import pytest
from training_helpers import ROOT

ROOMS = {  # what the modules of each may import
    "longconv": {"longconv"},
    "models": {"models", "longconv", "errors", "files", "fit"},
    "sequences": {"sequences", "models", "longconv"},
    "training": {"training", "errors", "files", "fit", "console", "figure", "tuning"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_layout_allows(room: str) -> None:
    found = set()
    for path in (ROOT / "sgconvnext" / room).rglob("*.py"):
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {each.name for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                found |= {f"{module}.{each.name}" for each in node.names}
    ours = {name.split(".")[1] for name in found if name.startswith("sgconvnext.")}
    assert ours <= ROOMS[room]
