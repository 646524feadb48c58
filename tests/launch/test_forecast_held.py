"""What the forecast calls exact, against what the engines of real runs hold."""

import json

import pytest

from configs.schema import TrainerConfig
from launch.forecast_memory import StageMeter, below
from tests.launch.small_runs import small_run
from tests.train.exact import PARAMS, exact_stage
from tests.train.forks import run_cases
from train.shares import frozen_share, trained_share

STRATEGIES = {
    "ddp": {"strategy": "ddp"},
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "persistent": {"zero_stage": 3, "persistent_params": 100},
    "offload2": {"zero_stage": 2, "offload_optimizer": True},
    "offload3": {"zero_stage": 3, "offload_optimizer": True},
}
WAVES = 4
"""One after the other, so that each stays within its time limit."""
CASES = [(name, "distill") for name in STRATEGIES]
CASES += [(name, "salience") for name in ("zero1", "zero2", "zero3")]
LORA = [(name, "lora") for name in ("zero2", "zero3", "persistent")]
"""Two networks and a frozen one; a head with parameters of odd sizes and two frozen networks; two
networks with adapters."""


def settings(name: str, **changes) -> dict:
    return {"strategy": "deepspeed", "persistent_params": 0} | STRATEGIES[name] | changes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    waves = []
    for some in ((CASES + LORA)[number::WAVES] for number in range(WAVES)):
        words: list[str] = []
        for name, kind in some:
            words += ["--then", str(folder / f"{name}-{kind}"), "--kind", kind]
            for key, value in settings(name).items():
                words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        waves.append({some[0][0]: {"program": "held", "folder": words[1], "words": words[2:]}})
    for ranks in run_cases(*waves, folder=folder).values():
        assert [rank["status"] for rank in ranks] == [0, 0], ranks[0]["stderr"][-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_shares_are_what_two_ranks_hold_byte_for_byte(two_ranks, name, kind):
    stage, trainer = exact_stage(kind), TrainerConfig(**settings(name))
    for rank in (0, 1):
        found = json.loads((two_ranks / f"{name}-{kind}-{rank}").read_text())
        saved = 0
        for network, module in stage.networks.items():
            sizes = [p.numel() for p in module.parameters()]
            share = trained_share(sizes, trainer, 2, has_average=True, rank=rank)
            held = found[network]
            assert held["parameters"] == share.parameters
            assert held["masters"] == share.masters
            assert held["moments"] == share.moments
            assert held["averages"] == share.averages
            if not trainer.offload_optimizer:  # else on its way between device and host
                assert held["gradients"] == share.gradients
            saved += share.saved * (2 if share.masters else 1)
        for network, module in stage.frozen.items():
            sizes = [p.numel() for p in module.parameters()]
            assert found["frozen"][network] == frozen_share(sizes, trainer, 2).parameters
        if rank == 0:  # the other one may look before all files are there
            assert found["checkpoint"]["bytes"] == saved


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), LORA)
def test_of_adapters_a_forecast_says_what_two_ranks_hold(two_ranks, name, kind):
    config = small_run("distill", exact_stage(kind), PARAMS["distill"])
    config.trainer = TrainerConfig(**settings(name))
    meter = StageMeter(config, "test", 2)
    shares = meter.measure().shares
    found = json.loads((two_ranks / f"{name}-{kind}-0").read_text())
    for network in ("student", "critic"):
        held, share = found[network], shares[network]
        assert held["parameters"] == share.parameters + shares[below(network)].parameters
        assert 0 < held["masters" if share.masters else "moments"] < held["parameters"]
        for part in ("masters", "moments", "averages"):
            assert held[part] == getattr(share, part), part
        if not config.trainer.offload_optimizer:
            assert held["gradients"] == share.gradients
    assert found["frozen"]["teacher"] == shares["teacher"].parameters
    assert found["checkpoint"]["bytes"] == meter.checkpoint_bytes()


def test_the_parts_of_all_ranks_make_up_a_network_and_little_more():
    sizes = [7, 1000, 13, 24]
    for stage in (1, 2, 3):
        trainer = TrainerConfig(**settings(f"zero{stage}"))
        for world in (2, 3, 8):
            share = trained_share(sizes, trainer, world, has_average=False)
            total = world * share.masters // 4
            assert sum(sizes) <= total < sum(sizes) + 2 * world * len(sizes)


def test_only_zero_3_takes_a_frozen_network_apart_and_only_large_parameters():
    sizes = [50, 5000]
    sharded = TrainerConfig(strategy="deepspeed", zero_stage=3, persistent_params=100)
    assert frozen_share(sizes, sharded, 4).parameters == 4 * (13 + 1250 + 50)
    whole = TrainerConfig(strategy="deepspeed", zero_stage=2)
    assert frozen_share(sizes, whole, 4).parameters == 4 * 5050
    small = TrainerConfig(strategy="deepspeed", zero_stage=3, persistent_params=10_000)
    assert frozen_share(sizes, small, 4).parameters == 4 * 5050
