"""Every command of the README, run as it stands there, on a run of the smallest size."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.launch.checkpoints import SMALL, random_weights, write_native, write_self_forcing

ROOT = Path(__file__).parents[1]


SMALLER = {
    "targets": shlex.split("--length 128 --heads 2 --block 32 --repeats 1"),
    "rollout": shlex.split(
        "--layers 1 --heads 1 --head-dim 24 --grid 2 3 --budget-frames 4 --block 1 --blocks 8"
        " --repeats 1"
    ),
    "train": shlex.split("--shape tiny --steps 2 --warmup 1"),
}
"""Flags with which a benchmark takes seconds."""


def launch_commands() -> list[list[str]]:
    """What follows `python` in every `python -m launch` and `torchrun` line of the README."""
    blocks = (ROOT / "README.md").read_text().split("```")[1::2]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.replace("torchrun ", "python -m torch.distributed.run ", 1) for line in lines]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("python ")]


def write_published(folder: Path) -> None:
    """Small checkpoints under the names that the README gives to those of others."""
    geometry = replace(SMALL, text_dim=32, in_channels=16, out_channels=16, patch_size=(1, 1, 1))
    weights = random_weights(geometry)
    write_native(folder / "Wan2.1-T2V-1.3B", weights, geometry=geometry)
    write_self_forcing(folder / "self_forcing_dmd.pt", ema=weights)
    write_self_forcing(folder / "longlive_base.pt", raw=weights)
    layer = "base_model.model.blocks.0.ffn.0"
    factors = {
        f"{layer}.lora_A.weight": torch.ones(2, geometry.width),
        f"{layer}.lora_B.weight": torch.ones(geometry.ffn_dim, 2),
    }
    torch.save({"generator_lora": factors}, folder / "lora.pt")
    (folder / "my.yaml").write_text(
        "name: mine\n"
        f"model: {{num_layers: {geometry.num_layers}, num_heads: 1, head_dim: 128, ffn_dim: "
        f"{geometry.ffn_dim}, freq_dim: {geometry.freq_dim}, rope_theta: 10000.0}}\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_command_works(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(words: list[str]) -> None:
        command = ["timeout", "-k", "10", "400", sys.executable, *words]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)

    # The README speaks of the demo, this one is as small as the tiny plan.
    run(["-m", "launch", "run", "configs/tiny.yaml", "name=demo"])
    write_published(tmp_path)
    commands = launch_commands()
    verbs = {"run", "show", "world", "ingest", "encode", "fit", "sample", "evaluate", "export"}
    verbs |= {"bench", "import", "plan", "slurm", "replay"}
    assert {words[2] for words in commands if words[1] == "launch"} == verbs
    for words in commands:
        run(words + SMALLER.get(words[3], []) if words[2] == "bench" else words)
    assert (tmp_path / "x.mp4").stat().st_size > 0
    assert (tmp_path / "runs/demo/again/results.json").is_file()
    assert (tmp_path / "weights/pafukv.json").is_file()
    assert (tmp_path / "runs/parts/teacher/DONE.json").is_file()
    assert "srun" in (tmp_path / "demo.sbatch").read_text()
    assert (tmp_path / "runs/two/evaluate/results.json").is_file()
