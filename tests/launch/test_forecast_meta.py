"""What stands in for data and for slow libraries in a forecast."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.schema import LoraConfig
from launch.forecast_activations import run_pass
from launch.forecast_meta import Rules, adapt
from models.transformer import VideoTransformer
from tests.launch.test_forecast import GEOMETRY, PASSES, SMALL
from train.lora import add_adapter

ROOT = Path(__file__).parents[2]
HEAVY = ["lightning", "deepspeed", "wandb", "torchmetrics", "peft"]
"""Each takes seconds to import."""
LORA = "stages.distill.lora.rank=4"


@pytest.mark.parametrize(
    "words", [["plan", "configs/tiny.yaml", LORA], ["show", "configs/tiny.yaml", LORA]]
)
def test_what_only_describes_a_run_loads_no_library_of_training(words):
    code = (
        "import sys; from launch.__main__ import main; status = main(sys.argv[1:]); "
        f"sys.exit(status or sorted({set(HEAVY)} & sys.modules.keys()) or 0)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"found {done.stderr}"


@pytest.mark.parametrize("module", ["launch.importing", "launch.sample"])
def test_verbs_that_do_not_train_load_no_lightning(module):
    code = f"import {module}, sys; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("targets", [LoraConfig().targets, ["ffn.0", "text_embedding.2", "head"]])
@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_an_adapter_takes_what_that_of_peft_takes(targets, is_bf16, recomputes):
    networks = []
    for _ in range(2):
        with torch.device("meta"):
            networks.append(VideoTransformer(**SMALL))
    add_adapter(networks[0], LoraConfig(rank=3, targets=targets), seed=0, key="lora")
    adapt(networks[1], 3, targets)
    shapes = [[(p.shape, p.requires_grad) for p in one.parameters()] for one in networks]
    assert shapes[0] == shapes[1]
    geometry = replace(GEOMETRY, is_bf16=is_bf16)
    for network in networks:
        network.recomputes_activations = recomputes
    for name in ("whole", "cached"):
        with Rules(is_bf16=is_bf16).in_force():
            real, found = (run_pass(network, geometry, PASSES[name]) for network in networks)
        assert found == real
