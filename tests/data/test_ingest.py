import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load

from configs.errors import UserError
from configs.schema import CodecConfig, TextConfig
from data.codec import build_codec
from data.ingest import ingest
from data.shards import BadSample, BadShard, ShardSet
from data.text import build_text
from data.truth import Truth, measure
from data.video import BadVideo, VideoWriter, read_video
from tests.data.conftest import FRAMES, encode_world


def files(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.fixture
def videos(tmp_path):
    """Three short videos of other sizes, with captions."""
    root = tmp_path / "videos"
    root.mkdir()
    draw = np.random.default_rng(0)
    lines = []
    for number, (frames, height, width) in enumerate([(9, 34, 80), (5, 48, 64), (12, 64, 66)]):
        name = f"v{number} x.y.mp4"
        with VideoWriter(root / name, 8, (height, width)) as writer:
            writer.write(draw.integers(0, 256, (frames, height, width, 3), dtype=np.uint8))
        lines.append(json.dumps({"file": name, "caption": f"video {number}", "note": number}))
    (root / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_raw_shards_hold_the_files_as_they_are(sets):
    raw = ShardSet(sets / "raw")
    assert len(raw) == 13
    for index in (0, 12):
        members = raw.read(index)
        meta = json.loads(members["json"])
        assert members["mp4"] == (sets / "world" / meta["file"]).read_bytes()
        assert (meta["frames"], meta["fps"], meta["height"], meta["width"]) == (23, 8.0, 32, 64)
        assert raw.entry(index).caption == meta["caption"]
        assert len(Truth.from_json(meta["truth"]).colors) == 5


def test_latent_shards_hold_what_codec_and_text_give(sets):
    raw, latents = ShardSet(sets / "raw"), ShardSet(sets / "latents")
    assert latents.properties["latents"] == [16, 2, 4]
    codec, text = build_codec(CodecConfig()), build_text(TextConfig())
    for index in (0, 7):
        members = latents.read(index)
        pixels = read_video(raw.read(index)["mp4"], frames=range(FRAMES))
        frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = load(members["latents.safetensors"])["latents"]
        torch.testing.assert_close(found, codec.encode(frames), rtol=0, atol=1e-6)
        vectors, words = text(raw.entry(index).caption)
        assert torch.equal(load(members["text.safetensors"])["text"], vectors[:words])
        truth = Truth.from_json(json.loads(members["json"])["truth"])
        scores = measure(codec.decode(found)[None], [truth], 0)
        assert scores["identity_correct"].eq(1).all()


def test_complete_sets_are_left_alone(sets, tmp_path):
    shutil.copytree(sets, tmp_path / "c")
    before = {name: files(tmp_path / "c" / name) for name in ("raw", "latents")}
    stamp = (tmp_path / "c/latents/manifest.json").stat().st_mtime_ns
    ingest(tmp_path / "c/world", tmp_path / "c/raw", samples_per_shard=3, progress=False)
    encode_world(tmp_path / "c/raw", tmp_path / "c/latents")
    assert {name: files(tmp_path / "c" / name) for name in before} == before
    assert (tmp_path / "c/latents/manifest.json").stat().st_mtime_ns == stamp


def test_an_interrupted_ingest_and_encode_go_on_to_the_same_bytes(sets, tmp_path, monkeypatch):
    from data.shard_writer import ShardSetWriter

    write = ShardSetWriter.write

    def stop_at(key_start):
        def stopping(self, key, members, **more):
            if key.startswith(key_start):
                raise KeyboardInterrupt
            write(self, key, members, **more)

        return stopping

    monkeypatch.setattr(ShardSetWriter, "write", stop_at("000007"))
    with pytest.raises(KeyboardInterrupt):
        ingest(sets / "world", tmp_path / "raw", samples_per_shard=3, progress=False)
    with pytest.raises(KeyboardInterrupt):
        encode_world(sets / "raw", tmp_path / "latents")
    monkeypatch.undo()
    for name in ("raw", "latents"):
        assert len(list((tmp_path / name).glob("shard-*.tar"))) == 2
        with pytest.raises(BadShard):
            ShardSet(tmp_path / name)
    stamp = (tmp_path / "raw/shard-000001.tar").stat().st_mtime_ns
    ingest(sets / "world", tmp_path / "raw", samples_per_shard=3, progress=False)
    encode_world(sets / "raw", tmp_path / "latents")
    assert (tmp_path / "raw/shard-000001.tar").stat().st_mtime_ns == stamp
    for name in ("raw", "latents"):
        assert files(tmp_path / name) == files(sets / name)


def test_all_bad_videos_are_named_before_anything_is_written(videos, tmp_path):
    good = (videos / "v0 x.y.mp4").read_bytes()
    (videos / "v0 x.y.mp4").write_bytes(good[: len(good) // 2])
    (videos / "v2 x.y.mp4").write_bytes(b"")
    with pytest.raises(BadVideo, match=r"(?s)2 videos.*v0 x\.y\.mp4.*v2 x\.y\.mp4"):
        ingest(videos, tmp_path / "raw", progress=False)
    assert not (tmp_path / "raw").exists()


def test_missing_and_too_short_videos_are_named(videos, tmp_path):
    with pytest.raises(BadVideo, match=r"(?s)1 video .*v1 x\.y\.mp4 must have at least 6 frames"):
        ingest(videos, tmp_path / "raw", min_frames=6, progress=False)
    (videos / "v1 x.y.mp4").unlink()
    with pytest.raises(BadVideo, match=r"v1 x\.y\.mp4: no such file"):
        ingest(videos, tmp_path / "raw", progress=False)
    assert not (tmp_path / "raw").exists()


def test_a_list_file_and_a_folder_give_the_same_shards(videos, tmp_path):
    ingest(videos, tmp_path / "a", progress=False)
    ingest(videos / "captions.jsonl", tmp_path / "b", progress=False)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert ShardSet(tmp_path / "a").entry(1).key == "000001-v1-x-y"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "no such"),
        ("", "at least one"),
        ("{", "line 1"),
        ('{"file": "a.mp4"}', "caption"),
        ('{"file": 3, "caption": ""}', "must be text"),
        ("[]", "line 1"),
    ],
)
def test_a_bad_list_is_a_user_error(tmp_path, content, match):
    if content is not None:
        (tmp_path / "captions.jsonl").write_text(content)
    with pytest.raises(UserError, match=match):
        ingest(tmp_path, tmp_path / "raw", progress=False)
    assert not (tmp_path / "raw").exists()


def test_long_videos_are_cut_scaled_and_thinned(videos, tmp_path):
    ingest(videos, tmp_path / "raw", progress=False)
    encode_world(tmp_path / "raw", tmp_path / "latents", frames=2, every=3, stride=3, size=(32, 32))
    latents = ShardSet(tmp_path / "latents")
    keys = [latents.entry(index).key for index in range(len(latents))]
    # a clip spans 4 frames: 9 frames hold starts 0, 3; 5 hold 0; 12 hold 0, 3, 6
    starts = {"000000-v0-x-y": [0, 3], "000001-v1-x-y": [0], "000002-v2-x-y": [0, 3, 6]}
    assert keys == [f"{key}-{start:06d}" for key, some in starts.items() for start in some]
    members = latents.read(1)
    assert load(members["latents.safetensors"])["latents"].shape == (2, 16, 2, 2)
    meta = json.loads(members["json"])
    assert (meta["clip_start"], meta["every"], meta["note"]) == (3, 3, 0)
    pixels = read_video(videos / "v0 x.y.mp4", frames=[3, 6], size=(32, 32))
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    wanted = build_codec(CodecConfig()).encode(frames)
    torch.testing.assert_close(load(members["latents.safetensors"])["latents"], wanted)


def test_videos_of_other_rates_are_read_by_time(videos, tmp_path):
    ingest(videos, tmp_path / "raw", progress=False)  # 8 frames per second
    cut = {"frames": 2, "stride": 2, "size": (32, 32)}
    encode_world(tmp_path / "raw", tmp_path / "latents", rate=5.0, **cut)
    latents = ShardSet(tmp_path / "latents")
    keys = [latents.entry(index).key for index in range(len(latents))]
    # 9, 5 and 12 frames, of which 6, 3 and 7 are at fifths of a second
    starts = {"000000-v0-x-y": [0, 2, 4], "000001-v1-x-y": [0], "000002-v2-x-y": [0, 2, 4]}
    assert keys == [f"{key}-{start:06d}" for key, some in starts.items() for start in some]
    # Moments 2 / 5 and 3 / 5 of a second are frames 3.2 and 4.8.
    pixels = read_video(videos / "v0 x.y.mp4", frames=[3, 5], size=(32, 32))
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = load(latents.read(1)["latents.safetensors"])["latents"]
    torch.testing.assert_close(found, build_codec(CodecConfig()).encode(frames))
    assert json.loads(latents.read(1, "json")["json"])["clip_start"] == 2
    assert latents.read(1, "json").keys() == {"json"}
    # The rate is part of what the set is.
    encode_world(tmp_path / "raw", tmp_path / "latents", rate=4.0, **cut)
    assert ShardSet(tmp_path / "latents").hash != latents.hash


def test_videos_that_are_too_slow_or_too_short_at_a_rate_are_all_named(videos, tmp_path):
    with pytest.raises(BadVideo, match=r"(?s)3 videos.*v0 .*at least .* = 16 frames .*found 8"):
        ingest(videos, tmp_path / "raw", rate=16.0, progress=False)
    with pytest.raises(BadVideo, match=r"(?s)1 video .*v1 .*found 5, of which 3 at 5 per second"):
        ingest(videos, tmp_path / "raw", rate=5.0, min_frames=4, progress=False)
    assert not (tmp_path / "raw").exists()
    ingest(videos, tmp_path / "raw", progress=False)
    with pytest.raises(BadVideo, match="000000-v0-x-y must have at least"):
        encode_world(tmp_path / "raw", tmp_path / "latents", frames=2, rate=16.0)
    with pytest.raises(BadSample, match="000001-v1-x-y must have 4 frames for one clip, found 3"):
        encode_world(tmp_path / "raw", tmp_path / "latents", frames=4, rate=5.0)
    assert not (tmp_path / "latents").exists()


def test_encode_refuses_before_it_writes(videos, tmp_path):
    ingest(videos, tmp_path / "raw", progress=False)
    out = tmp_path / "latents"
    with pytest.raises(BadSample, match="000001-v1-x-y must have 9 frames"):
        encode_world(tmp_path / "raw", out, frames=9)
    with pytest.raises(UserError, match=r"source\.size"):
        encode_world(tmp_path / "raw", out, frames=3, size=(32, 40))
    with pytest.raises(UserError, match=r"text\.length"):
        encode_world(tmp_path / "raw", out, frames=3, text=TextConfig(length=1))
    with pytest.raises(BadShard, match="complete set"):
        encode_world(tmp_path / "nowhere", out)
    assert not out.exists()


def test_a_damaged_raw_shard_stops_encoding_and_leaves_no_set(sets, tmp_path):
    shutil.copytree(sets / "raw", tmp_path / "raw")
    offset = ShardSet(tmp_path / "raw").entry(5).members["mp4"][0]
    shard = tmp_path / "raw/shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[offset + 500] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BadSample, match=r"shard-000001\.tar::000005-clip-000005\.mp4"):
        encode_world(tmp_path / "raw", tmp_path / "latents")
    with pytest.raises(BadShard):
        ShardSet(tmp_path / "latents")


def test_settings_are_part_of_what_complete_means(sets, tmp_path):
    shutil.copytree(sets / "latents", tmp_path / "latents")
    encode_world(sets / "raw", tmp_path / "latents", frames=11)
    assert ShardSet(tmp_path / "latents").entry(0).frames == 11
