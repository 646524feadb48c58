import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import CodecConfig, TextConfig, WorldConfig
from data.codec import build_codec
from data.text import build_text
from data.truth import (
    COLOR_NAMES,
    CRISP_LIMIT,
    DARK,
    PALETTE,
    checker_pattern,
    nearest_class,
    split_cells,
    wall_columns,
)
from data.video import read_video
from data.world import (
    Truth,
    caption_of,
    measure,
    measure_self_consistency,
    render_clip,
    templates,
    truth_at,
    write_world,
)

CLEAN = WorldConfig(frames=47, noise=0.0)


def values(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_a_clip_is_a_function_of_config_and_index():
    first, again = render_clip(CLEAN, 3), render_clip(CLEAN, 3)
    np.testing.assert_array_equal(first.frames, again.frames)
    assert first.truth == again.truth
    assert (render_clip(CLEAN, 4).frames != first.frames).any()
    assert (render_clip(replace(CLEAN, seed=1), 3).frames != first.frames).any()
    assert first.frames.shape == (47, 32, 64, 3)


def test_split_cells_is_plain_slicing():
    frames = torch.rand(2, 5, 3, 32, 64)
    cells = split_cells(frames)
    assert cells.shape == (2, 5, 2, 4, 3, 16, 16)
    torch.testing.assert_close(cells[:, :, 1, 2], frames[..., 16:32, 32:48], rtol=0, atol=0)


def test_truth_written_out_by_hand():
    truth = Truth(colors=(0, 4, 2), shapes=(0, 1, 1), phase=5, track_row=1, opening_column=2)
    # frame 0: the wheel has turned 5 frames: gondola 2, second frame; frame 1: gondola 0; ...
    shown = truth_at(truth, range(8))
    assert shown.identity.tolist() == [5, 0, 0, 9, 9, 5, 5, 0]
    assert shown.lit.tolist() == [[1, 3], [1, 2], [1, 3], [1, 2], [1, 3], [1, 2], [1, 3], [1, 2]]
    assert shown.dark.tolist() == [[1, 2], [1, 3], [1, 2], [1, 3], [1, 2], [1, 3], [1, 2], [1, 3]]
    assert truth.period == 6
    assert wall_columns(truth) == (0, 1)
    assert truth_at(truth, [6_000_003]).identity.tolist() == shown.identity[3:4].tolist()


@pytest.mark.parametrize("as_text", [True, False])
def test_truth_survives_json(as_text):
    truth = render_clip(CLEAN, 0).truth
    text = truth.to_json()
    assert Truth.from_json(text if as_text else json.loads(text)) == truth


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"colors": 3}', None])
def test_a_bad_truth_is_a_user_error(text):
    with pytest.raises(UserError, match="ground truth"):
        Truth.from_json(text)


@pytest.mark.parametrize("index", range(12))
def test_a_true_clip_measures_as_perfect(index):
    clip = render_clip(CLEAN, index)
    frames = values(clip.frames)[None]
    found = measure(frames, [clip.truth], 0, reference=frames[:, :5])
    assert found["identity_correct"].eq(1).all()
    assert found["position_correct"].eq(1).all()
    # 8-bit rounding: at most 1/255 off on [-1, 1], squared.
    assert found["pixel_error"].max() < 2e-5
    assert found["crisp"].eq(1).all()
    assert found["background_error"].max() < 1e-9
    assert found["identity_repeated"][0, :20].isnan().all()
    assert found["identity_repeated"][0, 20:].eq(1).all()
    is_checker = truth_at(clip.truth, range(47)).identity % 2 == 1
    contrast = found["checker_contrast"][0]
    torch.testing.assert_close(
        contrast[is_checker], torch.ones(int(is_checker.sum())), rtol=0, atol=5e-3
    )
    assert contrast[~is_checker].isnan().all()
    consistent = measure_self_consistency(frames, [clip.truth])[0]
    assert consistent[:20].isnan().all()
    assert consistent[20:].eq(1).all()


def test_measure_starts_at_any_frame():
    clip = render_clip(CLEAN, 5)
    found = measure(values(clip.frames)[None, 17:], [clip.truth], 17)
    assert found["identity_correct"].eq(1).all()
    assert "background_error" not in found


def test_measure_sees_each_kind_of_error():
    clip = render_clip(CLEAN, 2)
    frames = values(clip.frames)[None]
    shifted = measure(frames, [clip.truth], 1, reference=frames)  # a frame late
    assert shifted["position_correct"].max() == 0
    empty = measure(torch.full_like(frames, DARK), [clip.truth], 0, reference=frames)
    assert empty["position_correct"].max() == 0
    assert empty["crisp"].max() == 0  # clean, but nothing is there
    assert empty["background_error"].min() > 0.05
    flat = frames.reshape(1, 47, 3, 2, 16, 4, 16).mean(dim=(4, 6), keepdim=True)
    blurred = flat.expand(1, 47, 3, 2, 16, 4, 16).reshape(frames.shape)
    found = measure(blurred, [clip.truth], 0)
    assert found["checker_contrast"].nan_to_num().abs().max() < 1e-5
    assert found["pixel_error"].max() > 0.01
    is_checker = truth_at(clip.truth, range(47)).identity % 2 == 1
    torch.testing.assert_close(found["crisp"][0], (~is_checker).float())  # solid ones have no edges
    other = replace(clip.truth, colors=tuple((c + 1) % 6 for c in clip.truth.colors))
    wrong = measure(frames, [other], 0)
    assert wrong["identity_correct"].max() == 0
    assert wrong["crisp"].eq(1).all()  # another gondola is no blur


def test_the_limit_of_crispness_is_half_a_blurred_checker():
    checkers = templates()[1::2]
    blurred = checkers.mean(dim=(2, 3), keepdim=True)
    faintest = (checkers - blurred).square().mean(dim=(1, 2, 3)).min()
    assert 0.9 * faintest / 2 < CRISP_LIMIT <= faintest / 2


def test_an_empty_wheel_is_not_consistent():
    clip = render_clip(CLEAN, 2)
    empty = torch.full_like(values(clip.frames)[None], DARK)
    found = measure_self_consistency(empty, [clip.truth])[0]
    assert found[:20].isnan().all()
    assert found[20:].eq(0).all()


def test_measure_keeps_videos_apart():
    clips = [render_clip(CLEAN, index) for index in (7, 8)]
    both = torch.stack([values(clip.frames) for clip in clips])
    found = measure(both, [clip.truth for clip in clips], 0, reference=both)
    for row, clip in enumerate(clips):
        alone = measure(both[row : row + 1], [clip.truth], 0, reference=both[row : row + 1])
        for name, one in alone.items():
            torch.testing.assert_close(found[name][row : row + 1], one, equal_nan=True)
    with pytest.raises(ValueError, match="one truth per video"):
        measure(both, [clips[0].truth], 0)


def test_templates_are_their_own_nearest_class():
    looks = templates()
    assert looks.shape == (12, 3, 16, 16)
    identity, error = nearest_class(looks)
    assert identity.tolist() == list(range(12))
    assert error.max() == 0
    torch.testing.assert_close(looks[6, :, 3, 4], PALETTE[3])
    assert checker_pattern()[0, 0] > 0.99
    assert checker_pattern()[0, -1] < -0.99


def test_birds_fly_three_frames_through_the_sky_and_no_bird_without_decoys():
    for index in range(8):
        truth = render_clip(CLEAN, index).truth
        calm = split_cells(values(render_clip(replace(CLEAN, decoys=0.0), index).frames))
        assert calm[:, 1 - truth.track_row].std(dim=0).max() == 0
        sky = split_cells(values(render_clip(CLEAN, index).frames))[:, 1 - truth.track_row]
        has_bird = nearest_class(sky)[1] < 1e-3  # [F, 4]
        assert has_bird.sum(dim=1).max() == 1
        number, column = has_bird.nonzero().T
        follows = (number.diff() == 1) & (column.diff() == 1)
        assert follows.float().mean() > 0.5


def test_layouts_and_identities_vary_and_captions_tell_only_the_layout():
    truths = [render_clip(replace(CLEAN, frames=1), index).truth for index in range(60)]
    assert {truth.track_row for truth in truths} == {0, 1}
    assert {truth.opening_column for truth in truths} == {0, 1, 2}
    assert {color for truth in truths for color in truth.colors} == set(range(6))
    assert len({truth.phase for truth in truths}) > 10
    captions = {caption_of(truth) for truth in truths}
    assert len(captions) == 6
    assert all(name in caption for name in COLOR_NAMES for caption in captions)
    text = build_text(TextConfig())
    assert all(text(caption)[1] <= 12 for caption in captions)


def test_the_codec_loses_nothing_of_the_world():
    codec = build_codec(CodecConfig())
    frames = values(render_clip(CLEAN, 1).frames)
    lost = (codec.decode(codec.encode(frames)) - frames).abs().max()
    assert lost < 2 / 255  # 8-bit rounding is all there is outside the kept frequencies


def test_a_written_world_is_what_was_rendered(sets):
    rows = [json.loads(line) for line in (sets / "world/captions.jsonl").read_text().splitlines()]
    assert len(rows) == 13
    config = WorldConfig(clips=13, frames=23, identities=5, period=10)
    codec = build_codec(CodecConfig())
    for index in (0, 12):
        clip = render_clip(config, index)
        pixels = read_video(sets / "world" / rows[index]["file"])
        error = np.square(pixels.astype(float) - clip.frames).mean()
        assert 10 * np.log10(255**2 / error) > 38  # dB
        assert Truth.from_json(rows[index]["truth"]) == clip.truth
        assert rows[index]["caption"] == clip.caption
        frames = codec.decode(codec.encode(values(pixels)))[None]
        found = measure(frames, [clip.truth], 0)
        assert found["identity_correct"].eq(1).all()
        assert found["checker_contrast"].nanmean() > 0.98


def test_writing_again_changes_nothing_and_an_interrupted_world_goes_on(tmp_path, monkeypatch):
    config = WorldConfig(clips=4, frames=5)
    write_world(config, tmp_path / "whole", progress=False)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert set(whole) == {"captions.jsonl", "world.json", *(f"clip-{n:06d}.mp4" for n in range(4))}
    stamp = (tmp_path / "whole/clip-000000.mp4").stat().st_mtime_ns
    write_world(config, tmp_path / "whole", progress=False)
    assert (tmp_path / "whole/clip-000000.mp4").stat().st_mtime_ns == stamp

    def interrupted(config, index):
        if index == 2:
            raise KeyboardInterrupt
        return render_clip(config, index)

    monkeypatch.setattr("data.world.render_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_world(config, tmp_path / "half", progress=False)
    assert not (tmp_path / "half/world.json").exists()
    kept = (tmp_path / "half/clip-000001.mp4").stat().st_mtime_ns
    (tmp_path / "half/.clip-000002.mp4.part-1").write_bytes(b"left by a kill")
    monkeypatch.undo()
    write_world(config, tmp_path / "half", progress=False)
    assert (tmp_path / "half/clip-000001.mp4").stat().st_mtime_ns == kept
    assert {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()} == whole


def test_another_world_replaces_ours_but_nothing_else(tmp_path):
    write_world(WorldConfig(clips=3, frames=4), tmp_path / "w", progress=False)
    write_world(WorldConfig(clips=2, frames=4, seed=9), tmp_path / "w", progress=False)
    assert len(list((tmp_path / "w").glob("*.mp4"))) == 2
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/clip-000000.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"clip-000000\.mp4"):
        write_world(WorldConfig(clips=1, frames=2), tmp_path / "holiday", progress=False)
    assert [path.name for path in (tmp_path / "holiday").iterdir()] == ["clip-000000.mp4"]
