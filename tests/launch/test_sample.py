"""`python -m launch sample` on a student with random weights."""

import re
import resource

import pytest
import torch

from configs.load import load_config, to_dict
from configs.schema import WorldConfig
from data.video import VideoWriter, read_video
from data.world import caption_of, render_clip
from launch.__main__ import main
from launch.export import write_export
from launch.geometry import network_config
from launch.student import head_from_config, transformer_from_config

SIZES = ["model.num_layers=1", "model.ffn_dim=32", "model.freq_dim=16", "model.num_heads=1"]
CLIP = render_clip(WorldConfig(frames=12), 0)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    config = load_config(["name=random", *SIZES])
    networks = network_config(config)
    torch.manual_seed(0)
    network, head = transformer_from_config(networks["model"]), head_from_config(networks)
    torch.nn.init.normal_(network.head.head.weight, std=0.1)
    folder = tmp_path_factory.mktemp("student") / "export"
    shared = {"codec": to_dict(config.codec), "text": to_dict(config.text), "size": [32, 64]}
    write_export(
        folder,
        weights={"transformer": network.state_dict(), "head": head.state_dict()},
        manifest={
            "role": "student",
            "stage": "random",
            "sampler": {"sigmas": [1.0, 0.5, 0.0], "renoise": True},
            "config": networks | shared | {"fps": 8, "every": 1, "frames": 12},
        },
    )
    return folder


def sample(student, out, *more, frames=20, budget=40) -> int:
    words = ["--prompt", caption_of(CLIP.truth), "--frames", str(frames), "--budget", str(budget)]
    return main(["sample", str(student), *words, "--out", str(out), "--device", "cpu", *more])


def test_prefix_prompt_switch_and_policy_give_a_video_and_a_summary(student, tmp_path, capsys):
    prefix, out = tmp_path / "prefix.mp4", tmp_path / "x.mp4"
    with VideoWriter(prefix, 8, (32, 64), crf=1, pixel_format="yuv444p") as writer:
        writer.write(CLIP.frames)
    other = caption_of(render_clip(WorldConfig(frames=1), 1).truth)
    flags = ["--prefix", str(prefix), "--prefix-frames", "12", "--prompt-at", "15", other]
    status = sample(student, out, *flags, "--param", "weights=[1,1,1]", "--param", "age_weight=0.1")
    assert status == 0
    frames = read_video(out)
    assert frames.shape == (20, 32, 64, 3)
    # The prefix is shown as the codec and two H.264 passes leave it.
    assert abs(frames[:12].astype(int) - CLIP.frames).mean() < 12
    line = capsys.readouterr().out.strip().splitlines()[-1]
    found = re.fullmatch(r".*x\.mp4: 20 frames, [\d.]+ FPS, (\d+) tokens .*, (\d+) bytes", line)
    assert found, line
    assert int(found[1]) == 40
    assert int(found[2]) == 40 * 32 * 2 * 4  # tokens x width x (key, value) x float32


def test_a_prefix_of_a_higher_rate_is_read_by_time(student, tmp_path):
    prefix, out = tmp_path / "prefix.mp4", tmp_path / "x.mp4"
    with VideoWriter(prefix, 16, (32, 64), crf=1, pixel_format="yuv444p") as writer:
        writer.write(CLIP.frames.repeat(2, axis=0))
    flags = ["--prefix", str(prefix), "--prefix-frames", "12"]
    assert sample(student, out, *flags, frames=14) == 0
    assert abs(read_video(out)[:12].astype(int) - CLIP.frames).mean() < 12


@pytest.mark.parametrize(
    ("flags", "tokens", "size"),
    [
        (["--storage", "int8"], 40, 40 * (2 * 32 + 6)),  # codes, and three float16
        (["--storage", "int4"], 40, 40 * (32 + 6)),
        (["--evicted", "low", "--evicted-tokens", "8"], 40, 40 * 256 + 8 * (32 + 6)),
        (["--evicted", "offload", "--evicted-tokens", "8"], 40, (40 + 8) * 256),
        (["--prompt-at", "10", "blue", "--at-switch", "flush"], 40, 40 * 256),
        (["--prompt-at", "10", "blue", "--at-switch", "cut"], 40, 40 * 256),
    ],
)
def test_other_caches_and_switches_give_a_video(student, tmp_path, capsys, flags, tokens, size):
    assert sample(student, tmp_path / "x.mp4", *flags) == 0
    assert f"{tokens} tokens per layer cached, {size} bytes" in capsys.readouterr().out
    assert read_video(tmp_path / "x.mp4").shape == (20, 32, 64, 3)


def test_a_cut_changes_what_follows_and_nothing_before(student, tmp_path):
    videos = {}
    for switch in ("flush", "cut"):
        out = tmp_path / f"{switch}.mp4"
        flags = ["--prompt-at", "10", "blue", "--at-switch", switch]
        assert sample(student, out, *flags) == 0
        videos[switch] = read_video(out)
    difference = abs(videos["flush"].astype(int) - videos["cut"]).mean(axis=(1, 2, 3))
    # The encoder spreads its error over frames just before a change, too.
    assert difference[:6].max() < difference[10:].mean() / 2


def test_the_seed_decides_the_video(student, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert sample(student, tmp_path / f"{name}.mp4", "--seed", str(seed), frames=8) == 0
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "salient"], "choose one of"),
        (["--budget", "20"], "must hold sink and recent frames"),
        (["--wan", "folder"], "--wan needs a student whose codec or text encoder are networks"),
        (["--param", "age_weigth=1"], "did you mean 'age_weight'"),
        (["--param", "age_weight=abc"], "must be a number"),
        (["--param", "weights=3"], "must be 3 numbers"),
        (["--param", "weights=[1,1"], "YAML value"),
        (["--steps", "0"], "at least 1"),
        (["--shift", "0"], "--shift must be above 0"),
        (["--frames", "0"], "--frames must be at least 1"),
        (["--prompt-at", "99", "red"], "--prompt-at needs a frame between"),
        (["--prefix", "absent.mp4", "--prefix-frames", "3"], "whole blocks"),
    ],
)
def test_bad_flags_end_with_one_sentence_and_leave_nothing(
    student, tmp_path, capsys, flags, message
):
    assert sample(student, tmp_path / "x.mp4", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_frames_run_in_constant_memory(student, tmp_path):
    assert sample(student, tmp_path / "short.mp4", frames=1000) == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    assert sample(student, tmp_path / "long.mp4", frames=10_000) == 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # All latents and pixels of the longer video would be 70 MB.
    assert grown < 20_000
