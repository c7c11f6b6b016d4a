"""The memory that preflight foretells against what the first update takes, in a process of its own."""

import re
import subprocess
import sys

import pytest
from training_helpers import ROOT, environment

SCRIPT = """
import sys
from pathlib import Path
sys.path.append("tests")
import torch
from training_helpers import batches_of, micro_config, noise, training, update
from sgconvnext.training import preflight

def resident(key):  # unlike ru_maxrss, not inherited from the parent
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024

torch.set_num_threads(1)
t = training(micro_config(**{"optim.batch_per_device": 2048, "optim.global_batch": 2048}))
print(preflight.rehearse(t, (3, 32, 32)))
before = resident("VmRSS")
update(t, batches_of(2048, *noise(2048)), 1e-3)
print(resident("VmHWM") - before)
"""


def gib(line: str) -> float:
    found = re.match(r"about ([\d.]+) GiB of the [\d.]+ GiB of a cpu process", line)
    assert found, line
    return float(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_is_roughly_what_the_first_update_takes() -> None:
    told, grown = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    measured = int(grown) / 2**30
    assert measured > 0.1
    assert measured / 2 < gib(told) < measured * 2
