import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from configs.load import load_config
from configs.schema import LoraConfig
from data.batches import SwitchBatch
from launch.__main__ import main
from launch.forecast import forecast
from launch.forecast_activations import Geometry, pass_memory, run_pass
from launch.forecast_flops import pass_flops
from launch.forecast_knobs import Cluster
from launch.forecast_memory import StageMeter
from launch.forecast_meta import FilledCache, LiveBytes, Rules, kv_types
from launch.forecast_moments import MOMENTS, policy_features
from launch.forecast_passes import CAUSAL, PAIRED, Pass, step_passes
from models.kv_policies import build_policy
from models.kv_spec import CacheSpec
from models.rollout import make_cache, refresh
from models.transformer import VideoTransformer
from tests.launch.small_runs import small_run
from tests.models.small import small_transformer
from tests.train.small_stages import KINDS, batch, build, small_head
from train.flops import count_flops

ROOT = Path(__file__).parents[2]
SMALL = {
    "num_layers": 5,
    "num_heads": 3,
    "head_dim": 20,
    "ffn_dim": 200,
    "freq_dim": 24,
    "text_dim": 40,
    "patch_size": (1, 2, 2),
}
GEOMETRY = Geometry(tuple(sorted(SMALL.items())), block=3, size=(6, 10), rows=7, is_bf16=False)
PASSES = {
    "whole": Pass("", 6, with_grad=True),
    "short": Pass("", 3, with_grad=True),
    "cached": Pass("", 3, past=50, with_grad=True),
    "paired": Pass("", 12, wanted=6, attention=PAIRED, with_grad=True),
}
PARAMS = {
    "distill": {
        "student_every": 2,
        "prefix_frames": [4],
        "budgets": [30],
        "student_steps": 1,
        "guidance_scale": 2.0,
    },
    "streaming": {
        "student_every": 3,  # of four steps per stream, so that each sees either kind
        "student_steps": 1,
        "budget_tokens": 30,
        "prefix_frames": 4,
        "chunk_frames": 4,
        "stream_frames": 20,
        "switch_chance": 1.0,
    },
    "salience": {"statistics_steps": 2, "horizon": 1},
}


ADAPTERS = {
    "all layers": LoraConfig(rank=3),
    "the student's": LoraConfig(rank=3, networks=["student"]),
    "a few layers": LoraConfig(rank=3, targets=["blocks.1.ffn.0", "text_embedding.2", "head"]),
}


def count_steps(kind: str, steps: int, lora: LoraConfig | None = None) -> tuple[float, float]:
    """Operations of a mean step: as predicted, and as counted while small stages train."""
    stage = build(kind, PARAMS.get(kind), steps=steps, lora=lora, negative_text=torch.ones(3, 8))
    config, counted = small_run(kind, stage, PARAMS.get(kind, {})), 0
    for step in range(steps):
        drawn = batch(2, 10 + 2 * step)
        if kind == "streaming":
            drawn = SwitchBatch(**vars(drawn), next_text=drawn.text.flip(1))
        with count_flops(stage.modules()) as counter:
            stage.update(drawn, step)
        stage.completed += 1
        counted += counter.total
    meter = StageMeter(config, "test", 1)
    found = [
        (each.count, pass_flops(config, each, meter.lora(each.network)))
        for each in step_passes(config, "test")
    ]
    return 2 * sum(count * (cost.forward + cost.backward) for count, cost in found), counted / steps


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_a_mean_step_are_those_that_are_counted(kind):
    predicted, counted = count_steps(kind, 12 if kind == "streaming" else 4)
    # Exact but for the streams' changes of prompt, whose places are drawn.
    assert predicted == pytest.approx(counted, rel=0.02 if kind == "streaming" else 1e-9)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_operations_of_adapters_are_those_that_are_counted(adapter):
    predicted, counted = count_steps("distill", 4, ADAPTERS[adapter])
    assert predicted == pytest.approx(counted, rel=1e-9)


def real_network(recomputes: bool) -> VideoTransformer:
    torch.manual_seed(0)
    network = VideoTransformer(**SMALL)
    network.recomputes_activations = recomputes
    return network


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", PASSES)
def test_memory_of_a_pass_without_data_is_that_of_a_real_one(name, recomputes):
    predicted = pass_memory(GEOMETRY, PASSES[name], recomputes=recomputes)
    assert predicted == run_pass(real_network(recomputes), GEOMETRY, PASSES[name])


def test_without_checkpointing_a_pass_keeps_what_autograd_saves():
    for name in ("whole", "short"):
        found, network = PASSES[name], real_network(False)
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor, saved=saved):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage
            return tensor

        latents, sigma = torch.randn(1, found.frames, 16, 6, 10), torch.rand(1, found.frames)
        text = torch.randn(1, 7, 40)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            velocity = network(latents, sigma, text)
        given = {
            x.untyped_storage().data_ptr()
            for x in (*network.parameters(), latents, sigma, text, velocity)
        }
        real = sum(storage.nbytes() for key, storage in saved.items() if key not in given)
        # The velocity itself, and small tensors that no backward pass reads.
        assert pass_memory(GEOMETRY, found, recomputes=False).kept == pytest.approx(real, rel=0.03)


def test_in_bfloat16_a_pass_takes_what_autocast_takes_on_a_cpu():
    geometry = Geometry(GEOMETRY.network, block=3, size=(6, 10), rows=7, is_bf16=True)
    with torch.device("meta"):
        network = VideoTransformer(**SMALL)
        with Rules(is_bf16=True, norms_in_float32=False).in_force():
            predicted = run_pass(network, geometry, PASSES["cached"])
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        real = run_pass(real_network(False), geometry, PASSES["cached"])
    assert predicted.kept == pytest.approx(real.kept, rel=0.01)
    assert predicted.backward == pytest.approx(real.backward, rel=0.01)
    on_cuda = pass_memory(geometry, PASSES["cached"], recomputes=False)
    assert on_cuda.kept > predicted.kept  # norms in float32 there


def test_a_converted_weight_counts_until_no_backward_pass_needs_it():
    network, wide = torch.nn.Linear(6, 5, bias=False), 4
    with (
        LiveBytes(network.parameters()) as live,
        torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
    ):
        x = torch.ones(2, 6, requires_grad=True)
        y = network(x)
        held = 2 * 6 * wide + 2 * (2 * 6) + 2 * 5 * 2  # the input, twice; the output
        assert live.now == held + 2 * (6 * 5)
        with torch.no_grad():
            before = live.now
            del y
            network(x)
        assert live.now == before - 2 * 5 * 2 - 2 * (2 * 6) - 2 * (6 * 5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["random", "salience", "full"])
def test_bytes_of_a_cache_are_those_that_it_holds(policy, precision):
    stage = build("streaming", PARAMS["streaming"])
    config = small_run("streaming", stage, PARAMS["streaming"])
    config.trainer.precision = precision
    student = small_transformer()
    spec = CacheSpec(budget_tokens=30, tokens_per_frame=6, frames_per_block=2)
    seeds = torch.arange(2)
    cache = make_cache(
        student, spec=spec, policy=build_policy(policy), seeds=seeds, head=small_head()
    )
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16)
    with bf16 if precision == "bf16" else nullcontext():
        for _ in range(4):
            refresh(student, torch.randn(2, 3, 8), torch.randn(2, 2, 16, 2, 3), cache=cache)
    held = cache.num_bytes
    for tokens in cache.layers:
        held += tokens.positions.nbytes + tokens.features.nbytes
        parts = (tokens.parts["keys"].dtype, tokens.parts["values"].dtype)
        assert parts == kv_types(precision == "bf16")
    count = 48 if policy == "full" else 30
    assert cache.num_tokens == count
    meter = StageMeter(config, "test", 1)
    assert meter.cache_bytes(count, policy_features(policy, {})) == held


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_rollout_takes_what_its_blocks_take_together(recomputes):
    config = small_run("distill", build("distill", PARAMS["distill"]), PARAMS["distill"])
    config.trainer.strategy, config.trainer.zero_stage = "deepspeed", 2
    config.trainer.activation_checkpointing = recomputes
    meter, network = StageMeter(config, "test", 2), small_transformer()
    network.recomputes_activations = recomputes
    moments = {moment.name: moment.total for moment in MOMENTS["distill"](meter)}
    tokens, types = [24, 30, 30, 30], kv_types(False)  # of blocks from frame 4 to 12
    inputs = torch.randn(1, 2, 16, 2, 3), torch.rand(1, 2), torch.randn(1, 3, 8)
    with LiveBytes((*network.parameters(), *inputs)) as live:
        caches = [FilledCache(network, count, samples=1, types=types) for count in tokens]
        velocities = [network(*inputs, cache=cache) for cache in caches]
        live.peak = live.now
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(drop_gradient)
        torch.stack([velocity.sum() for velocity in velocities]).sum().backward()
    predicted = max(moments[f"student's {which} block back"] for which in ("first", "next"))
    # The last gradients to come are not all there yet when activations are most.
    assert predicted == pytest.approx(live.peak, rel=0.05)


def drop_gradient(parameter):
    parameter.grad = None


@pytest.mark.parametrize(
    ("file", "gpu", "layers", "budget"), [("wan_1_3b", "H100", 30, 12), ("wan_14b", "H200", 40, 9)]
)
def test_shipped_wan_configs_fit_and_are_planned_by_few_passes(file, gpu, layers, budget):
    config = load_config([str(ROOT / "configs" / f"{file}.yaml")])
    pass_memory.cache_clear()
    stages = forecast(config, Cluster(gpu, 8, 8, 0.4))
    # Half a second each is nearly all that a forecast takes; seconds depend on who else computes.
    assert pass_memory.cache_info().misses <= 11
    assert [stage.name for stage in stages] == list(config.stages)
    assert all(stage.fits and not stage.knobs for stage in stages)
    # Per token in every layer: keys and values in bfloat16, places and a lot.
    token = layers * (config.model.num_heads * 128 * 4 + 3 * 8 + 4)
    assert stages[1].device["KV cache"] == budget * 1560 * token
    whole = 4 * {30: 1_418_996_800, 40: 14_288_491_584}[layers]
    first = stages[0]
    part = first.device["parameters"] if config.trainer.zero_stage == 3 else 0
    assert first.start_bytes == whole + part
    assert first.mapped_bytes == first.host_end["transformer"] == whole
    assert not any(first.host_start.values())
    assert first.executed > first.flops > 0


def test_what_does_not_fit_comes_with_settings_that_help():
    changes = ["trainer.strategy=deepspeed", "trainer.zero_stage=1", "stages.distill.batch=8"]
    changes += ["stages.streaming.batch=4", "stages.control.batch=4"]
    config = load_config([str(ROOT / "configs" / "tiny.yaml"), *changes])
    own = forecast(config, Cluster("H100", 1, 2, 0.4), stage="distill")[0]
    assert own.fits
    assert own.knobs == []
    tight = Tight("H100", 1, 2, 0.4)
    found = forecast(config, tight, stage="distill")[0]
    settings = {knob.setting: knob for knob in found.knobs}
    assert not found.fits
    for setting in ("trainer.zero_stage=2", "trainer.activation_checkpointing=true", "--nodes 2"):
        assert settings[setting].device_bytes < found.device_bytes
    assert settings["trainer.offload_optimizer=true"].device_bytes < found.device_bytes
    assert any(" " in knob.setting.removeprefix("--nodes ") for knob in found.knobs)  # together


class Tight(Cluster):
    """GPUs that nothing fits."""

    @property
    def usable_bytes(self) -> int:
        return 1


def test_plan_prints_a_table_and_writes_numbers_and_a_picture(tmp_path, capsys):
    files = {"--json": tmp_path / "plan.json", "--figure": tmp_path / "plan.png"}
    options = [str(word) for pair in files.items() for word in pair]
    config = str(ROOT / "configs" / "tiny.yaml")
    assert main(["plan", config, "--gpu", "a100", "--stage", "teacher", *options]) == 0
    text = capsys.readouterr().out
    assert re.search(r"teacher \(teacher\): [\d.]+ MiB of 68.5 GiB, fits", text)
    record = json.loads(files["--json"].read_text())
    (stage,) = record["stages"]
    assert stage["device_bytes"] == sum(stage["device"].values())
    assert stage["device"]["moments"] == 2 * stage["device"]["parameters"]
    assert files["--figure"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.num_layer=3"], "'model.num_layer' is not a key of the configuration"),
        (["--stage", "teachr"], "found 'teachr'; did you mean 'teacher'?"),
        (["--nodes", "2", "--gpus-per-node", "2"], "single runs one process, found 4"),
        (["--efficiency", "40"], "--efficiency must lie above 0 and not above 1, found 40.0"),
        (["--figure", "x.txt"], "--figure must end in one of"),
        (["--json", "no/such/folder/x.json"], "must be writable"),
        (
            ["trainer.strategy=ddp", "--gpus-per-node", "3"],
            "must be a multiple of ranks x micro_batch = 3",
        ),
    ],
)
def test_what_cannot_be_planned_fails_with_one_sentence(words, message, capsys):
    config = str(ROOT / "configs" / "tiny.yaml")
    assert main(["plan", config, "stages.distill.frames=12", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("file", ["wan_1_3b", "wan_14b"])
def test_a_shipped_wan_config_shows_but_does_not_run_with_its_placeholders(file, capsys):
    config = str(ROOT / "configs" / f"{file}.yaml")
    assert main(["show", config]) == 0
    shown = capsys.readouterr().out
    assert {"wan_1_3b": "1,418,996,800", "wan_14b": "14,288,491,584"}[file] in shown
    assert "not known yet: paths.videos must be a path of yours" in shown
    assert main(["run", config]) == 2
    assert "give paths.videos=PATH" in capsys.readouterr().err


def test_captured_hidden_states_stay_after_a_pass():
    found = Pass("", 6, wanted=0, attention=CAUSAL)
    kept = pass_memory(GEOMETRY, found, recomputes=False).kept
    assert kept == 5 * (6 * 15) * 60 * 4  # layers x tokens x width, float32
