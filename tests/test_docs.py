"""What README and docs/ say is true: snippets run, commands are parsed, and paths, links and counts are right."""

import ast
import functools
import importlib
import inspect
import re
import runpy
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.distributed.run import get_args_parser as torchrun_parser
from training_helpers import CONFIGS, ROOT

import train
import validate
from sgconvnext.longconv import BACKENDS
from sgconvnext.models.kernel import CHOICES, kernel_options
from sgconvnext.models.sgconvnext import SIZES
from sgconvnext.profile import flops
from sgconvnext.training.config import from_dict, load_config
from sgconvnext.training.image_folders import SUFFIXES

README = ROOT / "README.md"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [README, *sorted((ROOT / "docs").glob("*.md"))]
}
MARKS = {
    "docs/dense-prediction.md": pytest.mark.integrations,
    "docs/integrations.md": pytest.mark.integrations,
    "docs/quantisation.md": pytest.mark.integrations,
    "docs/export.md": pytest.mark.end_to_end,
    "docs/layer.md": pytest.mark.end_to_end,
}
SCRIPTS = [f"docs/{name}.py" for name in ("segmentation", "quantisation", "exports")]
NOT_RUN = {"text", "bibtex"}  # "text" holds equations, trees, and commands of older commits
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(PAGES[page]) if found == language]


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return BLOCK.sub("", PAGES[page])


def inline_code(page: str) -> list[str]:
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


# ---- snippets


def test_blocks_are_of_a_language_that_is_checked() -> None:
    for page, text in PAGES.items():
        assert text.count("```") == 2 * len(BLOCK.findall(text)), page
        assert {language for language, _ in BLOCK.findall(text)} <= {"python", "sh"} | NOT_RUN, page


def weights_of_the_hub(repository: str, **_: Any) -> dict[str, torch.Tensor]:
    """Random ones: no test reaches the hub."""
    model: Any = timm.create_model(repository.removeprefix("timm/"))
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=MARKS.get(page, [])) for page in PAGES if blocks(page, "python")],
)
def test_python_of_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[Any] = []  # thop and ptflops stand in for themselves; what they make of the rules is tested elsewhere
    thop = types.SimpleNamespace(profile=lambda model, inputs, custom_ops: told.append(custom_ops))
    ptflops = types.SimpleNamespace(
        get_model_complexity_info=lambda model, size, backend, custom_modules_hooks: told.append(custom_modules_hooks)
    )
    monkeypatch.setitem(sys.modules, "thop", thop)
    monkeypatch.setitem(sys.modules, "ptflops", ptflops)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", weights_of_the_hub)
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), {})
    assert all(issubclass(layer, torch.nn.Module) for rules in told for layer in rules)


# ---- commands


def commands(page: str) -> list[str]:
    """Every command of the shell blocks, and the inline code that is a command."""
    lines = [line for text in blocks(page, "sh") for line in text.replace("\\\n", " ").splitlines()]
    found = [
        part.strip() for line in lines if "train.py" in line or not is_script(page, line) for part in line.split("&&")
    ]
    programs = ("python ", "pip ", "torchrun ", "bash ")
    return [line for line in found if line] + [code for code in inline_code(page) if code.startswith(programs)]


def is_script(page: str, line: str) -> bool:
    """Whether a line is of a script, which bash checks."""
    return any(text.startswith("#!") and line.strip() in text for text in blocks(page, "sh"))


def parse_train(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    if arguments == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            train.parse_args()
        return
    args = train.parse_args()
    config = load_config(ROOT / args.config, args.overrides)
    assert timm.is_model(config.model.name)


def parse_torchrun(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = torchrun_parser().parse_args(arguments)
    module = ["-m"] if args.module else []
    parse([*module, args.training_script, *args.training_script_args], monkeypatch)


def parse_validate(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["validate.py", *arguments])
    from_dict({}, "validate.py", validate.parse_args().overrides)


def parse_module(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """python -m sgconvnext.NAME ..., of which NAME alone is a name in a sentence."""
    name, *rest = arguments
    assert name.startswith("sgconvnext.")
    package = (ROOT / name.replace(".", "/")).is_dir()
    module = importlib.import_module(f"{name}.__main__" if package else name)
    if len(rest) < 2:
        assert all(f'"{command}"' in inspect.getsource(module) for command in rest)
        return
    rest = ["convnext_tiny" if argument == "MODELS" else argument for argument in rest]
    monkeypatch.setattr(sys, "argv", [name, *rest])
    args = vars(module.parse_args())
    networks = [*args.get("models", []), *([args["network"]] if "network" in args else [])]
    for network in [*networks, *([args["against"]] if args.get("against") else [])]:
        assert network.startswith("runs/") or timm.is_model(network.split(",")[0]), network


def parse_pip(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("[tool")[0]
    [names] = re.fullmatch(r"install -e \.(?:\[([\w,]+)\])?", " ".join(arguments)).groups("")  # type: ignore[union-attr]
    assert all(re.search(rf"^{extra} = ", extras, re.MULTILINE) for extra in filter(None, names.split(",")))


def parse_docs(script: str) -> Callable[..., None]:
    """The command of a script in docs/, whose libraries only the extra has; tests/test_docs_scripts.py runs them."""

    def parse(arguments: list[str], _: pytest.MonkeyPatch) -> None:
        described = ast.get_docstring(ast.parse((ROOT / script).read_text()))
        assert f"python {script} {' '.join(arguments)}" in str(described)

    return parse


def parse_compare(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    args = runpy.run_path(str(ROOT / "docs" / "compare.py"))["parse_args"]()
    for network in args.networks:
        parse_train([args.config, *args.knobs, *shlex.split(network)], monkeypatch)


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = words
    if program in ("python", "srun", "bash"):
        parse(arguments, monkeypatch)
    elif program == "pytest":
        assert not arguments
    else:
        parsers: dict[str, Callable[..., None]] = {
            "train.py": parse_train,
            "validate.py": parse_validate,
            "torchrun": parse_torchrun,
            "-m": parse_module,
            "pip": parse_pip,
            "docs/compare.py": parse_compare,
            **{script: parse_docs(script) for script in SCRIPTS},
            "docs/gpu.sh": lambda arguments, _: None,  # tests/test_docs_scripts.py runs it
        }
        parsers[program](arguments, monkeypatch)  # what is in none of them is not checked, and so may not be shown


@pytest.mark.parametrize(
    ("page", "command"),
    [(page, command) for page in PAGES for command in commands(page)],
    ids=lambda value: value[:60],
)
def test_command_is_understood(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NNODES", "4")
    words = shlex.split(command.removesuffix("&").replace("$SLURM_NNODES", "4"))
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    parse(words, monkeypatch)


def test_commands_that_ci_and_newcomers_need_are_there_once() -> None:
    shown = "".join(blocks("README.md", "sh"))
    assert shown.count("pip install -e '.[demo]' && python train.py configs/digits.yaml\n") == 1
    assert len(re.findall(r"&& pytest$", shown, re.MULTILINE)) == 1  # .ci/run runs this line


# ---- paths, links, pictures


def expanded(path: str) -> list[str]:
    """a/{b,c}.d to a/b.d and a/c.d."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
    return [f"{found[1]}{choice}{found[3]}" for choice in found[2].split(",")] if found else [path]


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_a_page_names_exist(page: str) -> None:
    rooms = "|".join([*(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "runs"), *SUBROOMS])
    for code in inline_code(page):
        if re.fullmatch(rf"(?:{rooms})/[\w/.{{}},-]*", code) and "NAME" not in code:
            places = [[ROOT / path, ROOT / "sgconvnext" / path] for path in expanded(code)]
            assert all(any(place.exists() for place in either) for either in places), code


SUBROOMS = [path.name for path in (ROOT / "sgconvnext").iterdir() if path.is_dir() and path.name != "__pycache__"]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def test_readme_is_short_and_leads_to_every_page() -> None:
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 180
    assert {page for page in PAGES if page != "README.md"} <= set(re.findall(r"\]\((docs/[^)]+\.md)\)", text))


def test_pictures_are_small_and_all_are_shown() -> None:
    shown = {
        ((ROOT / page).parent / path).resolve()
        for page in PAGES
        for path in re.findall(r"\]\(([^)]+\.png)\)", PAGES[page])
    }
    assert shown == {path.resolve() for path in (ROOT / "docs").glob("*.png")}
    assert all(path.stat().st_size < 200_000 for path in shown)


def test_tests_that_the_fault_table_names_exist() -> None:
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    defined = {name for text in files.values() for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}
    [table] = [rows for rows in tables_of("docs/interrupted-runs.md") if "fault" in rows[0]]
    assert len(table) >= 25
    for row in table:
        tests, paths = re.findall(r"`(test_\w+)`", row["test"]), re.findall(r"tests/[\w/]+\.py", row["test"])
        assert tests or paths, row
        assert set(tests) <= defined, row
        assert set(paths) <= set(files), row


def test_layout_names_every_module_of_every_room_and_no_other() -> None:
    text = PAGES["docs/layout.md"]
    sections = dict(re.findall(r"^### (sgconvnext[\w/]*)/\n(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL))
    rooms = {path.parent for path in (ROOT / "sgconvnext").rglob("*.py")}
    assert set(sections) == {room.relative_to(ROOT).as_posix() for room in rooms}
    for room, section in sections.items():
        named = re.findall(r"`(\w+\.py)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))
        assert sorted(named) == sorted(path.name for path in (ROOT / room).glob("[!_]*.py")), room


def test_suffixes_that_are_named_are_those_that_are_read() -> None:
    [named] = re.findall(r"these suffixes are read: ([^,]*\.\w+)\.\s", PAGES["docs/data.md"])
    assert set(named.split()) == SUFFIXES


def test_layer_page_names_every_backend_and_every_option_of_a_kernel() -> None:
    backends, options = (
        {row[key].strip("`"): row for rows in tables_of("docs/layer.md") if key in rows[0] for row in rows}
        for key in ("backend", "argument")
    )
    assert set(backends) == {"auto", *BACKENDS}
    for name, option in inspect.signature(kernel_options).parameters.items():
        assert str(option.default) in options[name]["default"]
    for name, choices in CHOICES.items():
        assert all(f'"{choice}"' in "".join(options[name].values()) for choice in choices), name


# ---- sizes and counts


def tables_of(page: str) -> list[list[dict[str, str]]]:
    """Every table of a page: its rows, heading to cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", PAGES[page], re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def rows_of(page: str, name: str, heading: str) -> list[dict[str, str]]:
    """The rows of a model in every table of a page that has this heading."""
    tables = [rows for rows in tables_of(page) if heading in rows[0]]
    return [row for rows in tables for row in rows if row.get("model", "").strip("`") == name]


def row_of(page: str, name: str, heading: str) -> dict[str, str]:
    """The row of a model in the only table of a page that has this heading."""
    rows = rows_of(page, name, heading)
    assert len(rows) == 1, f"{page}: {name} needs one row in the table with the column {heading!r}, not {len(rows)}"
    return rows[0]


FAMILIES = {  # whose columns in README
    **{"sgconvnext_*": "", "convnext_*": "ConvNeXt's "},
    **dict.fromkeys(["sgconvnext_*_gap3", "sgconvnext_*_gated", "convnext_*_gated"]),
}


@functools.cache
def count_by_stage(family: str, px: int, depths: tuple[int, ...], dims: tuple[int, ...]) -> flops.Count:
    """The cost of a model of these depths and widths; a family is a name without its size, such as sgconvnext_*."""
    model = timm.create_model(family.replace("*", "tiny"), depths=depths, dims=dims)
    return flops.count(model, torch.zeros(1, 3, px, px))


def count(family: str, px: int, depths: tuple[int, ...], dims: tuple[int, ...]) -> dict[str, flops.Cost]:
    """The cost of a model by part, and of all: counted with one block a stage and multiplied, which takes seconds."""
    costs: dict[str, flops.Cost] = {"all": flops.Cost()}
    for (stage, part), cost in count_by_stage(family, px, (1, 1, 1, 1), dims).costs.items():
        for _ in range(depths[int(stage) - 1] if stage.isdecimal() and part != flops.STEM else 1):
            for key in (part, "all"):
                costs.setdefault(key, flops.Cost()).__iadd__(cost)
    return costs


@pytest.mark.parametrize(
    "family", ["sgconvnext_*", *(pytest.param(name, marks=pytest.mark.end_to_end) for name in list(FAMILIES)[1:])]
)
def test_cost_of_a_model_is_that_of_its_blocks_times_the_depths(family: str) -> None:
    """What `count` relies on."""
    shape = (family, 64, (2, 1, 2, 1), (8, 16, 24, 32))
    assert vars(count(*shape)["all"]) == pytest.approx(vars(count_by_stage(*shape).total()))


@pytest.mark.parametrize(
    "size", [size if size == "atto" else pytest.param(size, marks=pytest.mark.end_to_end) for size in SIZES]
)
def test_parameters_and_operations_in_the_tables_are_true(size: str) -> None:
    readme = row_of("README.md", f"sgconvnext_{size}", "depths")
    assert readme["depths"] == " ".join(map(str, SIZES[size]["depths"]))
    assert readme["widths"] == " ".join(map(str, SIZES[size]["dims"]))
    for family, whose in FAMILIES.items():
        name = family.replace("*", size)
        costs = count(family, 224, SIZES[size]["depths"], SIZES[size]["dims"])
        total = costs["all"]
        if whose is not None:
            assert readme[f"{whose}parameters"] == f"{total.parameters / 1e6:.2f}"
            assert readme[f"{whose}GMACs"] == f"{total.macs / 1e9:.2f}"
        printed = row_of("docs/results.md", name, "executed")
        assert printed == {
            "model": name,
            "parameters": f"{total.parameters:,d}",
            "GMACs": f"{total.macs / 1e9:.2f}",
            "executed": f"{total.executed / 1e9:.2f}",
            "GFLOPs": f"{2 * total.macs / 1e9:.2f}",
            "activations": f"{total.activations:,.0f}",
        }
        for timed in rows_of("docs/results.md", name, "ratio"):  # none is demanded
            if timed["px"] == "224":
                assert (timed["parameters"], timed["GMACs"]) == (printed["parameters"], printed["GMACs"])
        printed = row_of("docs/results.md", name, flops.MLP)
        true = {part: f"{costs[part].macs / 1e6:,.1f}" if part in costs else "-" for part in flops.PARTS}
        true[flops.EXECUTED] = f"{costs[flops.CONVOLUTION].executed / 1e6:,.1f}"
        assert printed == {"model": name} | {part: true[part] for part in printed if part != "model"}


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_a_config(size: str) -> None:
    config = load_config(CONFIGS / f"sgconvnext_{size}.yaml")
    assert config.model.name == f"sgconvnext_{size}"
    listed = [path for code in inline_code("docs/training.md") if "{" in code for path in expanded(code)]
    assert f"configs/sgconvnext_{size}.yaml" in listed


@pytest.mark.parametrize("size", SIZES)
def test_gated_model_has_the_recipe_of_the_plain_one(size: str) -> None:
    plain, gated = (load_config(CONFIGS / f"sgconvnext_{size}{ending}.yaml") for ending in ("", "_gated"))
    assert (gated.model.name, gated.out) == (f"sgconvnext_{size}_gated", f"runs/sgconvnext_{size}_gated")
    gated.model.name, gated.out = plain.model.name, plain.out
    assert gated == plain
