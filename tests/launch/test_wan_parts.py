"""A run whose latents and texts come from networks of Wan2.1's kinds, tiny and random."""

import re

import pytest
import torch
import yaml

from configs.load import load_config, to_dict
from data.batches import read_sample
from data.shards import ShardSet
from data.video import VideoWriter, read_video
from launch.__main__ import main
from launch.export import write_export
from launch.geometry import network_config
from launch.student import transformer_from_config
from tests.data.wan_parts import DIM, LENGTH, umt5, wan_codec, write_text, write_vae


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A file with a plan of one stage, whose clips are of two films of 19 frames, 10 a second."""
    root = tmp_path_factory.mktemp("run")
    write_vae(root / "wan")
    write_text(root / "wan")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        with VideoWriter(root / f"{name}.mp4", 10, (32, 64)) as writer:
            shape = (19, 32, 64, 3)
            writer.write(torch.randint(0, 256, shape, generator=generator).byte().numpy())
    lines = [f'{{"file": "{name}.mp4", "caption": "a wheel"}}' for name in ("a", "b")]
    (root / "captions.jsonl").write_text("\n".join(lines))
    stage = {"kind": "teacher", "steps": 1, "batch": 2, "frames": 2, "sample_every": 1}
    stage["optimizers"] = {"teacher": {"lr": 1e-3, "warmup": 1}}
    sizes = {"num_layers": 1, "num_heads": 1, "ffn_dim": 32, "freq_dim": 16}
    plan = {
        "name": "wan",
        "runs_dir": str(root / "runs"),
        "source": {"kind": "videos", "path": str(root), "size": [16, 32], "frames": 9, "fps": 5},
        "codec": vars(wan_codec(root / "wan")),
        "text": vars(umt5(root / "wan")),
        "model": sizes | {"text_dim": DIM},
        "stages": {"teacher": stage},
        "trainer": {"threads": 1, "accelerator": "cpu"},
        "tracking": {"wandb": "disabled"},
    }
    (root / "plan.yaml").write_text(yaml.safe_dump(plan))
    return root / "plan.yaml"


def test_a_run_encodes_trains_and_shows_what_it_makes_at_the_rate_that_films_are_read_at(plan):
    import av

    assert main(["run", str(plan)]) == 0
    run = plan.parent / "runs/wan"
    clip = read_sample(ShardSet(run / "data/latents"), 0)
    assert clip.latents.shape == (3, 16, 2, 4)
    assert clip.text.shape == (LENGTH, DIM)
    shown = run / "teacher/samples/step-00000001-0.mp4"
    assert len(read_video(shown)) == 5  # of 2 latent frames
    with av.open(str(shown)) as container:
        assert container.streams.video[0].average_rate == 5


def test_a_missing_network_ends_a_run_before_it_begins(plan, tmp_path, capsys):
    words = [str(plan), f"runs_dir={tmp_path}", f"codec.path={tmp_path}/nothing"]
    assert main(["run", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: codec.path must be a folder with config.json")
    assert error.count("\n") == 1
    assert not (tmp_path / "wan").exists()


def test_a_video_is_continued_in_whole_latent_frames(plan, tmp_path, capsys):
    config = load_config([str(plan)])
    networks = network_config(config)
    torch.manual_seed(0)
    network = transformer_from_config(networks["model"])
    shared = {"codec": to_dict(config.codec), "text": to_dict(config.text), "size": [16, 32]}
    write_export(
        tmp_path / "export",
        weights={"transformer": network.state_dict()},
        manifest={
            "role": "student",
            "stage": "random",
            "sampler": {"sigmas": [1.0, 0.0], "renoise": True},
            "config": networks | shared | {"fps": 5, "every": 2, "frames": 4},
        },
    )
    out = tmp_path / "x.mp4"
    words = [
        "--frames",
        "6",
        "--scale",
        "2",
        "--budget",
        "32",
        "--policy",
        "sink_window",
        "--device",
        "cpu",
    ]
    words += ["--prompt", "a wheel", "--prefix", str(plan.parent / "a.mp4"), "--out", str(out)]
    assert main(["sample", str(tmp_path / "export"), *words, "--prefix-frames", "2"]) == 0
    assert len(read_video(out)) == 1 + 5 * 4
    assert "x.mp4: 21 frames, " in capsys.readouterr().out
    # the same with the networks elsewhere
    (plan.parent / "wan").rename(plan.parent / "moved")
    moved, first = tmp_path / "moved.mp4", out.read_bytes()
    again = ["sample", str(tmp_path / "export"), *words, "--prefix-frames", "2"]
    assert main([*again, "--out", str(moved)]) == 2
    assert re.search(r"text\.path must be .* with such a folder 'text_", capsys.readouterr().err)
    assert main([*again, "--wan", str(plan.parent / "moved"), "--out", str(moved)]) == 0
    assert moved.read_bytes() == first
    (plan.parent / "moved").rename(plan.parent / "wan")
    # 4 latent frames show 13 pixel frames, every second of the file's: it has too few
    assert main(["sample", str(tmp_path / "export"), *words, "--prefix-frames", "4"]) == 2
    assert "must have 13 frames at 5 per second, found 10" in capsys.readouterr().err
