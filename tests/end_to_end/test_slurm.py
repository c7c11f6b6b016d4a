"""The SLURM script of docs/interrupted-runs.md, with SLURM's commands stood in for."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from training_helpers import ROOT, environment, write_config

from sgconvnext.training import checkpoint


def test_slurm_script_lets_the_run_save_and_queues_up_again(tmp_path: Path) -> None:
    """srun, torchrun and scontrol are stood in for; bash, the trap and train.py are real."""
    page = (ROOT / "docs" / "interrupted-runs.md").read_text()
    [script] = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    (tmp_path / "slurm.sh").write_text(script)
    config, out, log = write_config(tmp_path / "a.yaml", epochs=100), tmp_path / "out", tmp_path / "log"
    stubs = {
        "srun": f'echo "$@" > {tmp_path}/srun.said\nexec {sys.executable} train.py {config} out={out} "${{@: -2}}"',
        "scontrol": f'[ "$1" = show ] && echo node7 && echo node8 || echo "$@" > {tmp_path}/scontrol.said',
    }
    for name, text in stubs.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[7-10]"}
    variables = environment(**slurm, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with log.open("wb") as file:
        job = subprocess.Popen(
            ["bash", str(tmp_path / "slurm.sh")], cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT
        )
    while job.poll() is None and "epoch 1 update" not in log.read_text():
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0, log.read_text()
    assert "SIGTERM: stopped after" in log.read_text()
    assert (tmp_path / "scontrol.said").read_text() == "requeue 42\n"
    assert checkpoint.load(out / "last.pth")["epoch"] >= 0
    said = (tmp_path / "srun.said").read_text()
    assert "--rdzv-endpoint=node7:29500 --rdzv-id=42-0" in said
    assert said.endswith("resume=auto save.every=500\n")
