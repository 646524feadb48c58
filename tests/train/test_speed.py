"""What the rows say about time, memory and arithmetic."""

import json
import time

import pytest
import torch
from torch.nn import functional as F

from models.attention import block_causal_mask
from tests.models.small import SIZES, small_transformer
from tests.train.toy import WIDTH, ToyStage, final_weights, toy_batch, toy_config, toy_stage, train
from train.flops import FlopCounter, count_flops
from train.hardware import forget_peaks, peak_flops, peak_gigabytes, peak_of_name, take_memory
from train.spans import SPANS, Spans
from train.speed import Speedometer
from train.tracking import MACHINE_KEYS, MetricWindow

B, FRAMES, ROWS, COLUMNS, TEXT = 3, 4, 2, 5, 7


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def transformer_flops() -> int:
    """Of one forward pass of `small_transformer` on [B, FRAMES, 16, ROWS, COLUMNS], by hand."""
    tokens, width = FRAMES * ROWS * COLUMNS, SIZES["num_heads"] * SIZES["head_dim"]
    linear = 2 * width * width
    attention = 4 * tokens * tokens * width + 4 * tokens * linear
    crossing = 4 * tokens * TEXT * width + 2 * (tokens + TEXT) * linear
    feed_forward = 2 * tokens * 2 * width * SIZES["ffn_dim"]
    layers = SIZES["num_layers"] * (attention + crossing + feed_forward)
    text = TEXT * (2 * SIZES["text_dim"] * width + linear)
    time = FRAMES * (2 * SIZES["freq_dim"] * width + linear + 6 * linear)
    patches = 2 * 2 * tokens * 16 * width  # in and out
    return B * (layers + text + time + patches)


def inputs(requires_grad=False):
    latents = torch.randn(B, FRAMES, 16, ROWS, COLUMNS, requires_grad=requires_grad)
    return latents, torch.rand(B, FRAMES), torch.randn(B, TEXT, SIZES["text_dim"])


@pytest.mark.parametrize("is_masked", [False, True])
def test_flops_of_a_transformer_are_those_of_its_products(is_masked):
    network = small_transformer()
    mask = block_causal_mask(2, FRAMES * ROWS * COLUMNS // 2)[None, None] if is_masked else None
    with count_flops(network.modules()) as forward, torch.no_grad():
        network(*inputs(), mask=mask)
    assert forward.total == transformer_flops()
    latents, sigma, text = inputs(requires_grad=True)
    text.requires_grad_()
    with count_flops(network.modules()) as both:
        network(latents, sigma, text, mask=mask).square().mean().backward()
    # The gradients of a product are two products; the sinusoids of time need none.
    sinusoid = B * FRAMES * 2 * SIZES["freq_dim"] * SIZES["num_heads"] * SIZES["head_dim"]
    assert both.total == 3 * transformer_flops() - sinusoid


def test_recomputed_activations_count_once():
    counts = []
    for recomputes in (False, True):
        network = small_transformer()
        network.recomputes_activations = recomputes
        with FlopCounter() as counter:
            network(*inputs()).square().mean().backward()
        counts.append(counter.total)
    assert counts[0] == counts[1]


def test_attention_counts_alike_in_every_kernel():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    totals = set()
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (6, 10, 10))
        with sdpa_kernel(kernel), FlopCounter() as counter:
            F.scaled_dot_product_attention(q, k, v).sum().backward()
        totals.add(counter.total)
    assert totals == {3 * 2 * 2 * (2 * 3 * 6 * 10 * 8)}


def test_counting_changes_no_bit_of_a_training_and_happens_once_per_kind(tmp_path, monkeypatch):
    config = toy_config(steps=5, log_every=1)
    counted = train(tmp_path / "counted", config)
    size = config.stages["toy"].batch
    # A linear layer is 2 products forward and 2 more in its gradients, but for the first's input.
    layer = 2 * size * WIDTH * 5
    student_forward = critic_forward = 2 * layer
    critic = student_forward + critic_forward + 3 * layer
    student = student_forward + critic_forward + 2 * layer + 3 * layer  # judged by two networks
    student += 2 * student_forward  # and looked at before and after
    found = {key: value for key, value in counted.counters.items() if key.startswith("flops/")}
    assert found == {f"flops/both/{size}": student + critic, f"flops/critic/{size}": critic}
    expected = [student + critic, critic, student + critic, critic, student + critic]
    for row, flops in zip(rows_of(tmp_path / "counted"), expected, strict=True):
        seconds = row["speed/step_seconds"] + row["speed/wait_seconds"]
        assert row["speed/tflops_per_second"] * 1e12 * seconds == pytest.approx(flops)

    stage = toy_stage(config)
    stage.counters = dict(found)  # so nothing is counted
    monkeypatch.setattr("train.speed.count_flops", lambda modules: pytest.fail("counted again"))
    plain = final_weights(train(tmp_path / "plain", config, stage))
    weights = final_weights(counted)
    assert all(torch.equal(weights[key], plain[key]) for key in plain)


def test_parts_of_a_step_add_up_to_its_time(tmp_path, monkeypatch):
    def slow_batch(*args, **kwargs):
        time.sleep(0.02)
        return toy_batch(*args, **kwargs)

    monkeypatch.setattr("tests.train.toy.toy_batch", slow_batch)

    class Slow(ToyStage):
        def critic_loss(self, batch):
            time.sleep(0.02)
            return super().critic_loss(batch)

        def at_update(self, step):
            with self.spans("rollout"):
                time.sleep(0.01)

    config = toy_config(steps=4, log_every=4, checkpoint_every=1)
    train(tmp_path, config, toy_stage(config, Slow))
    (row,) = rows_of(tmp_path)
    parts = {name: row[f"speed/{name}_seconds"] for name in (*SPANS, "other")}
    whole = row["speed/step_seconds"] + row["speed/wait_seconds"]
    assert sum(parts.values()) == pytest.approx(whole, rel=0.05)
    assert all(seconds > 0 for seconds in parts.values())
    assert parts["score"] > 0.02
    assert 0.02 < parts["data"] <= row["speed/wait_seconds"]
    assert 0.01 < parts["rollout"] < 0.03  # with what is scored it would be more
    assert row["speed/samples_per_second"] == pytest.approx(4 / whole)
    assert row["speed/frames_per_second"] == row["speed/tokens_per_second"]  # one of one token
    assert row["memory/resident_gb"] > 0.05
    assert "speed/mfu" not in row
    machine = [key for key in row if key.startswith(MACHINE_KEYS)]
    assert not [key for key in machine if key.split("/")[0] not in ("speed", "memory")]
    assert {"step", "loss/critic"} <= row.keys() - set(machine)


def test_bringing_the_rows_to_the_disk_is_part_of_a_checkpoint(tmp_path, monkeypatch):
    stage = toy_stage(toy_config(steps=2, checkpoint_every=1))
    parts = []
    monkeypatch.setattr(
        "train.tracking.JsonlLogger.save", lambda logger: parts.append(stage.spans.current)
    )
    train(tmp_path, toy_config(steps=2, checkpoint_every=1), stage)
    assert parts.count("checkpoint") == 2  # Lightning does it again at the end


def test_an_inner_part_interrupts_the_outer(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    spans = Spans()
    with spans("score"), spans("rollout"):
        assert spans.current == "rollout"
    assert spans.take() == {"other": 1.0 + 16.0, "score": 2.0 + 8.0, "rollout": 4.0}


def test_rates_come_from_means_and_the_peak_from_the_config():
    stage = toy_stage(toy_config())
    stage.frame_seq_len = 10
    meter = Speedometer(stage)
    meter.peak_tflops = 2.0
    row = meter.row(
        {
            "loss": 1.0,
            "speed/step_seconds": 1.5,
            "speed/wait_seconds": 0.5,
            "speed/flops": 1e12,
            "speed/samples": 8.0,
        }
    )
    assert row == {
        "loss": 1.0,
        "speed/step_seconds": 1.5,
        "speed/wait_seconds": 0.5,
        "speed/samples_per_second": 4.0,
        "speed/frames_per_second": 4.0,
        "speed/tokens_per_second": 40.0,
        "speed/tflops_per_second": 0.5,
        "speed/mfu": 0.25,
    }


def test_memory_is_the_largest_of_all_ranks(monkeypatch):
    others = [({"loss": [2.0, 1]}, {"memory/resident_gb": 5.0})]
    monkeypatch.setattr("train.tracking.gather_objects", lambda own: [own, *others])
    window = MetricWindow()
    window.add({"loss": 1.0})
    assert window.close({"memory/resident_gb": 3.0}) == {"loss": 1.5, "memory/resident_gb": 5.0}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A10", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name, peak):
    assert peak_of_name(name) == peak


def test_a_cpu_has_no_peak_unless_it_is_given():
    assert peak_flops(torch.device("cpu")) is None
    assert peak_flops(torch.device("cpu"), 0.5) == 5e11
    assert take_memory(torch.device("cpu")).keys() == {"memory/resident_gb"}


class CudaMemory:
    """The counters of `torch.cuda`, without a device; in GB."""

    def __init__(self, monkeypatch):
        self.held = self.peak = 0.0
        for name in ("allocated", "reserved"):
            monkeypatch.setattr(torch.cuda, f"max_memory_{name}", lambda _: int(self.peak * 1e9))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device):
        self.peak = self.held

    def rise(self, peak):
        self.peak = max(self.peak, peak)


def test_rows_do_not_hide_the_peak_of_a_training_on_cuda(monkeypatch, tmp_path):
    memory, device = CudaMemory(monkeypatch), torch.device("cuda:0")
    memory.held = 1.0
    rows = []
    for peak in (5.0, 7.0, 3.0):
        memory.rise(peak)
        rows.append(take_memory(device)["memory/allocated_gb"])
    assert rows == [5.0, 7.0, 3.0]
    assert peak_gigabytes(device) == 7.0
    memory.rise(9.0)
    assert peak_gigabytes(device) == 9.0
    train(tmp_path, toy_config(steps=1))  # the next training begins anew, and forgets
    memory.reset(device)
    assert peak_gigabytes(device) == 1.0


def test_a_peak_from_before_the_first_row_counts(monkeypatch):
    memory, device = CudaMemory(monkeypatch), torch.device("cuda:0")
    memory.rise(5.0)
    forget_peaks()
    assert peak_gigabytes(device) == 5.0
