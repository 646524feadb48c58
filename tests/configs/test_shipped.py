"""Every configuration in the repository holds together."""

from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from configs.load import load_config, to_dict
from launch.plan import check_stages
from launch.show import cache_bytes, describe
from launch.student import transformer_from_config
from models.kv_policies import build_policy
from models.kv_spec import CacheSpec
from models.rollout import make_cache, refresh
from train.kind import rank_share

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TINY = next(path for path in FILES if path.stem == "tiny")
OVERLAYS = ("cluster",)
PLANS = [path for path in FILES if path.stem not in OVERLAYS]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_loads_and_its_stages_know_their_params(path):
    check_stages(load_config([str(path)]))


def test_the_overlay_for_a_cluster_fits_the_demo_on_64_ranks():
    demo, cluster = (str(TINY.with_name(f"{name}.yaml")) for name in ("demo", "cluster"))
    config = load_config([demo, cluster])
    check_stages(config)
    assert config.stages.keys() == load_config([demo]).stages.keys()
    assert {rank_share(stage, 64) for stage in config.stages.values()} == {1}


def test_show_builds_the_networks_and_names_the_steps(tmp_path):
    text = describe(load_config([str(TINY), f"runs_dir={tmp_path}"]))
    assert "transformer" in text
    assert "key-value cache" in text
    assert text.count("to do") == 13


def test_show_prints_the_caches_that_a_plan_has_and_no_others():
    demo = describe(load_config([str(TINY.with_name("demo.yaml"))]))
    assert "evaluate, 128 tokens" in demo
    assert "contenders:" in demo
    text = describe(load_config([str(TINY.with_name("wan_1_3b.yaml"))]))
    caches = text.split("key-value cache")[1].split("steps in")[0]
    found = dict(line.strip().rsplit(maxsplit=2)[:2] for line in caches.splitlines()[1:] if line)
    # Keys and values x layers x tokens x width x bfloat16.
    sizes = {tokens: 2 * 30 * tokens * 1536 * 2 for tokens in (14040, 18720, 237 * 1560)}
    assert found == {
        "distill, 14040 tokens": f"{sizes[14040]:,}",
        "distill, 18720 tokens": f"{sizes[18720]:,}",
        "streaming, 14040 tokens": f"{sizes[14040]:,}",
        "streaming, all of 237 frames": f"{sizes[237 * 1560]:,}",
    }
    assert "evaluate:" not in text
    assert "identities:" not in text


def test_show_takes_a_real_geometry_without_allocating_it(tmp_path):
    sizes = ["num_layers=30", "num_heads=12", "head_dim=128", "ffn_dim=8960", "freq_dim=256"]
    overrides = [f"model.{size}" for size in sizes]
    text = describe(load_config([str(TINY), f"runs_dir={tmp_path}", *overrides]))
    count = int(text.split("  transformer ")[1].split()[0].replace(",", ""))
    # Wan2.1 1.3B has 1,418,996,800 parameters; its text and patch embeddings are larger than ours.
    assert 1.3e9 < count < 1.45e9


def test_the_cache_size_shown_is_that_of_a_real_cache():
    config = load_config([str(TINY)])
    student = transformer_from_config(to_dict(config.model))
    blocks = torch.randn(3, 7, 16, 2, 4).split(2, dim=1)
    cache = make_cache(
        student,
        spec=CacheSpec(budget_tokens=40, tokens_per_frame=8, frames_per_block=2),
        policy=build_policy("fifo", {}),
        seeds=torch.arange(3),
    )
    for block in blocks:
        refresh(student, torch.zeros(3, 4, 32), block, cache=cache)
    assert cache.num_tokens == 40
    assert cache.num_bytes == 3 * cache_bytes(config, 40)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.teacher.kind=techer", r"stage kind must be one of .*found 'techer'"),
        ("stages.distill.params.student_evry=2", "did you mean 'student_every'"),
        ("stages.distill.params.budgets=[20]", r"params\.budgets must hold sink and recent .* 24"),
        ("stages.streaming.params.budget_tokens=20", r"params\.budget_tokens must hold sink"),
        ("stages.streaming.params.policy=salient", r"stages\.streaming\.params\.policy"),
        ("stages.streaming.params.policy_params.wights=[1,0,0]", r"streaming\.params\.policy"),
        ("stages.teacher.frames=11", r"teacher\.frames must be whole blocks of 2 frames"),
        ("stages.teacher.params.clean_prefix=2", r"clean_prefix must lie in 0 \.\. 1"),
        ("stages.causal.params.sample_steps=0", r"sample_steps must lie in 1"),
        ("stages.salience.params.statistics_steps=0", r"statistics_steps must lie in 1"),
        ("stages.salience.params.statistics_steps=6", r"statistics_steps must lie in 1 \.\. 5"),
        ("stages.salience.params.horizon=6", r"horizon must lie in 1 \.\. 5"),
        ("stages.distill.params.student_steps=0", r"student_steps must lie in 1"),
        ("stages.distill.params.prefix_frames=[3]", r"prefix_frames must be whole blocks"),
        ("stages.distill.params.prefix_frames=[12]", r"prefix_frames must lie in 0 \.\. 10"),
        ("stages.streaming.params.chunk_frames=5", r"chunk_frames must be whole blocks"),
        ("stages.streaming.params.stream_frames=7", r"stream_frames must lie in 8"),
        ("stages.streaming.params.time=relativ", r"time must be one of"),
        ("stages.streaming.params.max_lag=2", r"max_lag must lie in 3"),
        ("stages.causal.optimizers.teacher.lr=1", r"causal\.optimizers must name .*'student'"),
    ],
)
def test_what_only_the_stages_know_is_checked_before_anything_runs(override, message):
    with pytest.raises(ConfigError, match=message):
        check_stages(load_config([str(TINY), override]))
