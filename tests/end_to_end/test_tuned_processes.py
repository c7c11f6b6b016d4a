"""Rank 0 measures the backends of a run, and all of its processes take them."""

import json
from pathlib import Path

from training_helpers import ROOT, command, write_config

SCRIPT = """
import json, os, sys
sys.path.insert(0, {root!r})
import train
from sgconvnext.longconv import tuned
from sgconvnext.profile import race

fastest = ["dft", "toeplitz"][int(os.environ["RANK"])]  # by the clock of each process
race.times = lambda steps, *_: ({{name: 1.0 if name == fastest else 2.0 for name in steps}}, {{}})
train.main()
with open({folder!r} + "/rank" + os.environ["RANK"], "w") as file:
    json.dump([[which.length, which.work, by_batch] for which, by_batch in tuned._TUNED.items()], file)
"""


def test_processes_take_the_backends_that_rank_0_measured(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), folder=str(tmp_path)))
    config = write_config(tmp_path / "a.yaml", epochs=1, **{"run.tune": True, "optim.batch_per_device": 8})
    done = command(tmp_path / "script.py", config, f"out={tmp_path / 'out'}", processes=2)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert [64, "training", {"8": "dft"}] in found[0]
    assert done.stderr.count("backend: 8 channels x 64 samples, batch 8, float32, training: dft") == 1
