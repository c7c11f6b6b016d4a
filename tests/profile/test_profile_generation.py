"""profile generation: every network and past has its row, every step follows the same past, a wrong one is told."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sgconvnext.profile import __main__ as main
from sgconvnext.profile import generation, timing
from sgconvnext.profile.generation import Generation
from sgconvnext.sequences.generation import Bends
from sgconvnext.sequences.networks import LanguageModel


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: None) -> Callable[..., Any]:
    """The command in this process: its table, its exit code and what it says of errors."""
    monkeypatch.setattr(timing, "TURN_S", 1e-4)

    def told(*arguments: object) -> tuple[Any, Any, str]:
        brief = ["--dim", "16", "--device", "cpu", "--rounds", "2", "--round-seconds", "0.0001", "--json"]
        monkeypatch.setattr(sys, "argv", ["profile", "generation", *brief, *map(str, arguments)])
        code = None
        try:
            main.main()
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        return json.loads(out)["tables"][0] if out else None, code, err

    return told


def test_rows_are_of_every_past_batch_and_network_and_tell_what_the_states_hold(run: Callable[..., Any]) -> None:
    table, code, _ = run("--past", 40, 300, "--batch", 1, 2, "--depth", 2, "--layers", "C", "A", "CA")
    assert code is None
    names = ["CC", "AA", "CA", "CC reparameterized", "CA reparameterized"]
    found = [(row["past"], row["batch"], row["layers"]) for row in table["rows"]]
    assert found == [(past, batch, name) for past in (40, 300) for batch in (1, 2) for name in names]
    assert all(row["ms per token"] > 0 and row["prefill s"] > 0 and len(row["seconds"]) == 2 for row in table["rows"])
    assert all(set(generation.COLUMNS) <= set(row) for row in table["rows"])

    # bytes of a token and channel: keys and values 4 + 4; inputs 4, and sums 8 where there are scales beyond 256 taps
    held = {40: [4 + 4, 8 + 8, 4 + 8, 4 + 4, 4 + 8], 300: [12 + 12, 8 + 8, 12 + 8, 4 + 4, 4 + 8]}
    want = [batch * past * 16 * each / 2**20 for past in held for batch in (1, 2) for each in held[past]]
    assert [row["state MiB"] for row in table["rows"]] == want


def test_past_beyond_the_longest_prefill_is_read_by_sgconv_alone(run: Callable[..., Any]) -> None:
    table, code, _ = run("--past", 300, "--longest-prefill", 299, "--layers", "C", "AC", "--depth", 1)
    assert code is None
    read = {row["layers"]: row["prefill s"] is not None for row in table["rows"]}
    assert read == {"C": True, "AC": False, "C reparameterized": True, "AC reparameterized": False}
    sizes = {row["layers"]: row["state MiB"] * 2**20 for row in table["rows"]}
    assert sizes["AC"] == 300 * 16 * (8 + 12)  # as if it had been read


@pytest.mark.parametrize("name", ["CA", "CA reparameterized"])
def test_every_step_follows_the_same_past(name: str) -> None:
    work = Generation(past=300, batch=2, dim=16)
    model = generation.network(name, work)
    states, _ = generation.read(model, work, whole=True)
    assert [state.count for state in states.layers] == [300, 300]
    before = [[part.clone() for part in state.seen()] for state in states.layers]
    step = generation.prepare(model, states)
    for _ in range(3):  # the network has room for one token only
        step()
    after = [state.seen() for state in states.layers]
    for layer, same in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, same, strict=True))


def test_reparameterized_network_reads_all_its_taps_and_is_the_same_function() -> None:
    work = Generation(past=300, dim=16)
    tokens = torch.randint(256, (1, 300))
    plain, fixed = (generation.network(name, work) for name in ("CC", "CC reparameterized"))
    with torch.no_grad():
        assert torch.allclose(plain(tokens), fixed(tokens), rtol=1e-4, atol=1e-5)
    assert len(Bends(plain.layers[0].mixer.sgconv).near) == 256
    assert len(Bends(fixed.layers[0].mixer.sgconv).near) == 301


def test_sums_that_are_wrong_are_told(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = Bends.__init__

    def wrong(self: Any, layer: Any) -> None:
        made(self, layer)
        if len(self.lags):
            self.changes = self.changes * 1.01

    monkeypatch.setattr(Bends, "__init__", wrong)
    table, code, _ = run("--past", 600, "--layers", "C", "A", "--depth", 1)
    assert code == 1
    [problem] = [note for note in table["notes"] if "step and forward" in note]
    assert problem.startswith("step and forward of C differ by ")
    assert problem.endswith(" before 1 x 600 tokens.")


def test_step_that_is_not_finite_is_told(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step = LanguageModel.step

    def wrong(*arguments: Any) -> Any:
        logits, states = step(*arguments)
        return logits * torch.nan, states

    monkeypatch.setattr(LanguageModel, "step", wrong)
    table, code, _ = run("--past", 4, "--layers", "A", "--depth", 1)
    assert code == 1
    assert any("step and forward of A differ by nan" in note for note in table["notes"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "X"], "layers='XXXX' must be letters of"),
        (["--layers", "CL"], "a local convolution keeps no state"),
        (["--dim", "100"], "attention of 100 channels has no 4 heads"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(
    run: Callable[..., Any], arguments: list[str], words: str
) -> None:
    table, code, said = run("--past", 4, *arguments)
    assert (table, code) == (None, 2)
    assert said.count("\n") == 1
    assert words in said
