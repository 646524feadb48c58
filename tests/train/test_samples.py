"""Sample videos, and the salience beside them."""

import numpy as np
import pytest
import torch

from configs.schema import TrackingConfig
from data.video import read_video
from models.attention import block_causal_mask
from models.salience import SalienceHead
from tests.models.small import small_transformer
from tests.train.small_stages import FRAMES, batch, build
from tests.train.toy import ToyStage, toy_config, toy_stage, train
from tests.train.wandb_file import offline_runs
from train.salience import clean_hidden, later_map
from train.samples import beside_salience


@pytest.mark.parametrize(
    ("num_pixel_frames", "first", "last"), [(3, [0, 1, 2], [0, 1, 2]), (9, [0, 1, 5], [0, 4, 8])]
)
def test_every_frame_has_the_colours_of_the_latent_frame_that_shows_it(
    num_pixel_frames, first, last
):
    pixels = np.zeros((num_pixel_frames, 8, 12, 3), dtype=np.uint8)
    pixels[..., 0] = 200
    scores = np.zeros((3, 2, 3))
    bright = [(0, 1), (1, 2), (1, 0)]  # a token of each latent frame
    for frame, place in enumerate(bright):
        scores[frame][place] = 1
    panels = beside_salience(pixels, scores)
    assert panels.shape == (num_pixel_frames, 8, 24, 3)
    assert (panels[:, :, :12] == pixels).all()
    for frame, (row, column) in enumerate(bright):
        for number in range(first[frame], last[frame] + 1):
            heat = panels[number, :, 12:].astype(float).sum(axis=-1)
            cells = heat.reshape(2, 4, 3, 4).mean(axis=(1, 3))
            assert np.unravel_index(cells.argmax(), cells.shape) == (row, column)


def test_a_stage_with_a_head_gets_two_videos_and_both_reach_the_mirror(tmp_path):
    class WithHead(ToyStage):
        def preview_salience(self, batch):
            return torch.rand(1, 4, 2, 4)

    tracking = TrackingConfig(wandb="offline")
    config = toy_config(steps=2, sample_every=2, tracking=tracking)
    stage = toy_stage(config, WithHead)
    train(tmp_path, config, stage, decode=lambda latents: latents, fps=4)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-00000002-0-salience.mp4", "step-00000002-0.mp4"]
    plain, beside = (read_video(tmp_path / "samples" / name) for name in reversed(names))
    assert beside.shape == (len(plain), plain.shape[1], 2 * plain.shape[2], 3)
    (run,) = offline_runs(tmp_path)
    videos = [path for path in run.files if path.endswith(".mp4")]
    assert {path.split("/")[-1].split("_")[0] for path in videos} == {"samples", "salience"}


def test_the_map_of_the_salience_stage_is_the_heads_prediction_for_later_blocks():
    stage = build("salience")
    shown = batch()
    found = stage.preview_salience(shown)
    predicted, _ = stage.predict(shown)
    expected = (predicted[0][..., 0] + predicted[1][..., 0]) / 2
    assert found.shape == (2, FRAMES, 2, 3)
    assert torch.allclose(found.flatten(1), expected)
    assert torch.equal(stage.preview(shown), shown.latents)


def test_the_map_of_a_stream_shows_its_last_window():
    stage = build("streaming")
    assert stage.preview_salience(batch()) is None
    stage.update(batch(), 0)
    found, shown = stage.preview_salience(batch()), stage.preview(batch())
    assert found.shape == (*shown.shape[:2], 2, 3)
    other = shown.clone()
    other[:, -1] += 1  # a causal head sees it in the last block only
    stage._shown = other, batch().text
    changed = (stage.preview_salience(batch()) != found).flatten(2).any(dim=2)[0]
    assert changed.tolist() == [False] * (shown.shape[1] - 2) + [True] * 2
    while stage.streams:
        stage.update(batch(), 1)
    assert stage.preview(batch()).shape[1] == FRAMES, "a stream that just ended is shown"


def test_hidden_states_are_those_of_a_masked_clean_pass():
    student, shown = small_transformer(), batch()
    hidden = clean_hidden(student, shown.latents, shown.text, frames_per_block=2, block_len=12)
    captured = []
    with torch.no_grad():
        student(
            shown.latents,
            torch.zeros(2, FRAMES),
            shown.text,
            mask=block_causal_mask(FRAMES // 2, 12),
            capture=lambda layer, entering, queries, keys: captured.append(entering),
        )
    assert all(torch.equal(one, other) for one, other in zip(hidden, captured, strict=True))
    head = SalienceHead(num_layers=2, width=24, hidden=8, grid=(2, 3))
    assert later_map(head, hidden).shape == (2, FRAMES, 2, 3)
