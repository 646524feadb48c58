import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from configs.errors import ConfigError
from configs.schema import TrainerConfig
from train.fit import build_environment
from train.world import NONE, SLURM, TORCHRUN, World, launched_world, process_rank, resolve_world

ROOT = Path(__file__).parents[2]
RUN = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
JOB = {"SLURM_JOB_ID": "9", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "6", "SLURM_NNODES": "3"}
TASK = JOB | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
BY_HAND = {"SLURM_PROCID": "3", "SLURM_JOB_NAME": "interactive"}


def trainer(**changes) -> TrainerConfig:
    return TrainerConfig(strategy="deepspeed", **changes)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, World(NONE, 0, 1, 1)),
        (RUN, World(TORCHRUN, 5, 2, 3)),
        (RUN | TASK, World(TORCHRUN, 5, 2, 3)),
        (TASK, World(SLURM, 4, 2, 3)),
        (TASK | {"SLURM_NTASKS_PER_NODE": "2"}, World(SLURM, 4, 2, 3)),
        # A step that is smaller than its job, which may have been made by hand with salloc.
        (TASK | STEP | {"SLURM_PROCID": "3"}, World(SLURM, 3, 2, 2)),
        (TASK | STEP | BY_HAND, World(SLURM, 3, 2, 2)),
        # Shells: of salloc with and without a step of its own, and of a batch script.
        (JOB, World(NONE, 0, 1, 1)),
        (TASK | {"SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash"}, World(NONE, 0, 1, 1)),
        (TASK | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}, World(NONE, 0, 1, 1)),
        (TASK | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"}, World(NONE, 0, 1, 1)),
        # A child that Lightning started, and what DeepSpeed leaves behind in its parent.
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, World(NONE, 1, 1, 1)),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, World(NONE, 0, 1, 1)),
    ],
)
def test_the_launcher_says_how_many_processes_there_are_and_which_this_is(environ, expected):
    assert launched_world(environ) == expected
    assert process_rank(environ) == expected.rank
    assert expected.size == expected.devices * expected.num_nodes


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (TASK | {"SLURM_NTASKS": "5"}, r"as many processes, found 5 in all on 3 nodes with 2"),
        (TASK | STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,1(x2)"}, r"found 2,1\(x2\) \(SLURM\)"),
        (RUN | {"WORLD_SIZE": "5"}, r"found 5 in all on 2 nodes with 2 on this one \(torchrun\)"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, r"must set RANK, .* LOCAL_WORLD_SIZE, found RANK and"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(environ, message):
    with pytest.raises(ConfigError, match=message):
        launched_world(environ)


def test_the_config_may_say_what_the_launcher_says_or_nothing():
    expected = World(TORCHRUN, 5, 2, 3)
    assert resolve_world(trainer(), RUN) == expected
    assert resolve_world(trainer(devices=2, num_nodes=3), RUN) == expected
    assert resolve_world(trainer(), {}) == World(NONE, 0, 1, 1)
    assert resolve_world(trainer(devices=3), {"LOCAL_RANK": "2"}) == World(NONE, 2, 3, 1)


@pytest.mark.parametrize(
    ("config", "environ", "message"),
    [
        (trainer(devices=3), RUN, r"trainer\.devices=3 must be .* found 2 \(torchrun\)"),
        (trainer(num_nodes=2), TASK, r"trainer\.num_nodes=2 must be .* found 3 \(SLURM\)"),
        (trainer(num_nodes=2), {}, r"trainer\.num_nodes=2 needs a launcher on every node"),
        (TrainerConfig(), RUN, r"trainer\.strategy=single runs one process, found 6 .*torchrun"),
    ],
)
def test_a_config_that_contradicts_the_launcher_names_both(config, environ, message):
    with pytest.raises(ConfigError, match=message):
        resolve_world(config, environ)


def test_lightning_gets_the_environment_of_the_launcher(monkeypatch):
    for key, value in (TASK | STEP).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")  # of the job; put back after the test
    found = build_environment(launched_world())
    assert isinstance(found, SLURMEnvironment)
    assert (found.world_size(), found.global_rank(), found.auto_requeue) == (4, 4, False)
    found.validate_settings(num_devices=2, num_nodes=2)
    assert isinstance(build_environment(World(TORCHRUN, 0, 1, 1)), TorchElasticEnvironment)
    # In a shell within SLURM, Lightning's own guess would be SLURM.
    assert isinstance(build_environment(World(NONE, 0, 1, 1)), LightningEnvironment)


def test_rank_0_is_sought_on_the_first_node_of_the_step(monkeypatch):
    for key, value in (TASK | STEP | {"SLURM_NTASKS_PER_NODE": "2"}).items():
        monkeypatch.setenv(key, value)
    for of_step, expected in ((None, "node3"), ("node[04,5]", "node04")):
        monkeypatch.setenv("MASTER_ADDR", "")  # which Lightning sets: put back after the test
        monkeypatch.delenv("MASTER_ADDR")
        monkeypatch.setenv("SLURM_NODELIST", "node[3-5]")
        if of_step is not None:
            monkeypatch.setenv("SLURM_STEP_NODELIST", of_step)
        assert build_environment(launched_world()).main_address == expected


def test_the_command_line_starts_without_lightning():
    code = "import launch.__main__, sys; sys.exit('lightning' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=60).returncode == 0
