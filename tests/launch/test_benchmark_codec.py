import json

import pytest
import torch

from launch.__main__ import main
from launch.benchmark_codec import psnr, squared_error

CLIPS = ["bench", "codec", "configs/clips.yaml"]
FLAGS = ["--threads", "1", "--repeats", "1"]


def test_the_ratio_is_that_of_the_error_to_the_whole_range():
    frames = torch.full((2, 3, 4, 5), 0.5)
    # a tenth of the range, 2, everywhere: 20 dB; what leaves the range is clipped
    assert psnr(squared_error(frames, frames - 0.2)) == pytest.approx(20, abs=1e-4)
    assert psnr(squared_error(frames, frames + 9)) == pytest.approx(12.0412, abs=1e-4)
    assert psnr(squared_error(frames, frames)) == float("inf")


def test_the_fewer_numbers_a_codec_keeps_of_a_real_film_the_more_it_loses(tmp_path, capsys):
    found = {}
    for channels in (16, 768):
        out = tmp_path / f"{channels}.json"
        sizes = [f"codec.channels={channels}", f"model.in_channels={channels}"]
        assert main([*CLIPS, *sizes, *FLAGS, "--out", str(out)]) == 0
        found[channels] = json.loads(out.read_text())
    assert [video["file"] for video in found[16]["videos"]] == ["bigbuckbunny.mp4", "bikes.mp4"]
    assert found[16]["pixel_values_per_latent_value"] == 48
    assert 15 < found[16]["psnr"] < 35
    assert found[768]["psnr"] > 100  # all coefficients of a cell: rounding of float32 is left
    errors = [10 ** (-video["psnr"] / 10) for video in found[16]["videos"]]
    assert 10 ** (-found[16]["psnr"] / 10) == pytest.approx(sum(errors) / 2)
    assert found[16]["command"].startswith("python -m launch bench codec configs/clips.yaml codec.")
    assert "all: PSNR" in capsys.readouterr().out


def test_the_world_is_no_film(tmp_path, capsys):
    words = ["bench", "codec", "configs/tiny.yaml", "--out", str(tmp_path / "x.json")]
    assert main(words) == 2
    assert "needs films, source.kind=videos, found source.kind=world" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
