import json
import shutil

import pytest
import torch

from configs.errors import UserError
from data.batches import read_sample
from data.codec import build_codec
from data.datamodule import LatentDataModule
from data.ingest import encode, ingest
from data.pretrained import PretrainedError
from data.shards import ShardSet
from data.targets import target_window
from data.text import build_text, text_identity
from data.umt5 import clean
from data.video import read_video, to_values
from data.world import write_world
from tests.data.conftest import WORLD
from tests.data.wan_parts import (
    CAPTIONS,
    DIM,
    LENGTH,
    trained_tokenizer,
    umt5,
    wan_codec,
    write_text,
    write_vae,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan")
    write_vae(root)
    write_text(root)
    return root


@pytest.fixture(scope="module")
def text(folder):
    return build_text(umt5(folder))


@pytest.fixture
def copy(folder, tmp_path):
    """A folder of its own, to be damaged."""
    shutil.copytree(folder, tmp_path / "wan")
    return tmp_path / "wan"


@pytest.mark.parametrize("caption", [*CAPTIONS, ""])
def test_vectors_are_those_of_transformers_on_padded_tokens(folder, text, caption):
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    network = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    given = tokenizer(caption, padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        padded = network(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
    rows, count = text(caption)
    assert count == text.count(caption) == given.attention_mask.sum()
    assert rows.shape == (LENGTH, DIM)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows[:count], padded[0, :count], rtol=0, atol=1e-5)
    assert rows[count:].eq(0).all()


def test_texts_are_cleaned_as_wan_was_trained(text):
    # A dash whose UTF-8 was read as another encoding; ftfy leaves escapes alone beside a tag.
    assert clean("  a\n\t <i>large &amp;lt;rabbit&amp;gt; \u00e2\u20ac\u201c on ") == (
        "a <i>large <rabbit> \u2013 on"
    )
    messy, plain = text("  a  large\nrabbit on a&#32;meadow "), text("a large rabbit on a meadow")
    assert messy[1] == plain[1]
    assert torch.equal(messy[0], plain[0])


def test_a_text_that_is_too_long_is_refused_and_not_cut(folder):
    short = build_text(umt5(folder, length=4))
    for refuse in (short, short.count):
        with pytest.raises(
            UserError, match=r"at most text\.length = 4 tokens, found \d\d in 'a la"
        ):
            refuse(CAPTIONS[0])


def test_network_and_tokenizer_may_lie_in_one_folder(folder, text, tmp_path):
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / name, tmp_path / "one", dirs_exist_ok=True)
    both = build_text(umt5(tmp_path / "one", precision="bf16"))
    found, wanted = both(CAPTIONS[1])[0], text(CAPTIONS[1])[0]
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_an_encoder_may_lie_beside_its_decoder(copy):
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    sizes = {"vocab_size": 64, "d_kv": 8, "num_heads": 3, "d_ff": 32, "num_layers": 2}
    torch.manual_seed(1)
    whole = UMT5ForConditionalGeneration(UMT5Config(d_model=DIM, **sizes)).eval()
    whole.save_pretrained(copy / "text_encoder")
    text = build_text(umt5(copy))
    tokens = torch.tensor([text._tokenizer(CAPTIONS[0]).input_ids])
    with torch.no_grad():
        wanted = whole.encoder(tokens).last_hidden_state[0]
    rows, count = text(CAPTIONS[0])
    torch.testing.assert_close(rows[:count], wanted, rtol=0, atol=1e-6)


def test_what_vectors_depend_on_includes_the_tokenizer(copy):
    before = text_identity(umt5(copy))
    path = copy / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert text_identity(umt5(copy)) != before


def without_end(folder):
    trained_tokenizer(end="$A").save_pretrained(folder / "tokenizer")


def edit(folder, **changes):
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_tokenizer(folder):
    path = folder / "tokenizer/tokenizer.json"
    path.write_text(path.read_text()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"text\.path must be a folder with config\.json"),
        (lambda folder: edit(folder, model_type="t5"), r"of class or type umt5, found \['t5'\]"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), r"must hold a tokenizer, .* neither"),
        (cut_tokenizer, "must hold a whole tokenizer, loading it found"),
        (without_end, r"ends a text with its end token, found the tokens .* and the end token 1"),
        (lambda folder: edit(folder, num_layers=3), r"found 10 missing keys: encoder\.block\.2"),
        (lambda folder: edit(folder, vocab_size=9), r"must hold the whole weights of UMT5Encoder"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(PretrainedError, match=message):
        build_text(umt5(copy))


def test_sizes_that_contradict_the_config_are_named(folder, copy):
    with pytest.raises(PretrainedError, match=r"found text\.dim=4096; set text\.dim=24"):
        build_text(umt5(folder, dim=4096))
    from transformers import UMT5Config, UMT5EncoderModel

    small = UMT5Config(vocab_size=9, d_model=DIM, d_kv=8, num_heads=3, d_ff=32, num_layers=1)
    UMT5EncoderModel(small).save_pretrained(copy / "text_encoder")
    with pytest.raises(PretrainedError, match=r"the \d\d tokens of .* a vocabulary of 9; take"):
        build_text(umt5(copy))


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    """raw/ and latents/ of three clips of the world, as Wan2.1's networks encode them."""
    root = tmp_path_factory.mktemp("shards")
    write_world(WORLD, root / "world", progress=False)
    lines = (root / "world/captions.jsonl").read_text().splitlines()
    short = [json.dumps(json.loads(line) | {"caption": "a wheel"}) for line in lines[:3]]
    (root / "world/captions.jsonl").write_text("\n".join(short))
    ingest(root / "world", root / "raw", samples_per_shard=1, progress=False)
    encode_with(folder, root / "raw", root / "latents")
    return root


def encode_with(folder, raw, out, **changes):
    settings = {"size": (16, 32), "frames": 9, "every": 2, "stride": 3, "samples_per_shard": 1}
    codec, text = wan_codec(folder), umt5(folder)
    settings |= {"codec": codec, "text": text, "progress": False}
    encode(raw, out, **settings | changes)


def test_encoded_clips_hold_what_the_networks_give(folder, shards):
    raw, latents = ShardSet(shards / "raw"), ShardSet(shards / "latents")
    assert len(latents) == 3 * 3  # 17 of 23 frames: starts 0, 3 and 6
    assert latents.properties["latents"] == [16, 2, 4]
    sample, entry = read_sample(latents, 1), latents.entry(1)
    assert entry.frames == len(sample.latents) == 3
    pixels = read_video(raw.read(0)["mp4"], frames=range(3, 20, 2), size=(16, 32))
    wanted = build_codec(wan_codec(folder)).encode(to_values(pixels))
    assert torch.equal(sample.latents, wanted)
    assert torch.equal(sample.text, build_text(umt5(folder))("a wheel")[0])


def test_an_interrupted_encode_goes_on_to_the_same_bytes(folder, shards, tmp_path, monkeypatch):
    from data.shard_writer import ShardSetWriter

    write = ShardSetWriter.write

    def stop(self, key, members, **more):
        if key.startswith("000001"):
            raise KeyboardInterrupt
        write(self, key, members, **more)

    monkeypatch.setattr(ShardSetWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        encode_with(folder, shards / "raw", tmp_path / "latents")
    monkeypatch.undo()
    assert len(list((tmp_path / "latents").glob("shard-*.tar"))) == 3
    encode_with(folder, shards / "raw", tmp_path / "latents")
    files = [{p.name: p.read_bytes() for p in (shards / "latents").iterdir()}]
    files.append({p.name: p.read_bytes() for p in (tmp_path / "latents").iterdir()})
    assert files[0] == files[1]


def test_bad_networks_captions_and_lengths_are_found_before_the_first_video(
    folder, copy, shards, tmp_path, monkeypatch
):
    monkeypatch.setattr("data.ingest.read_chunks", lambda *_, **__: pytest.fail("a video was read"))
    out = tmp_path / "latents"
    with pytest.raises(UserError, match=r"source\.frames must be 1 \+ n x codec\.time_stride"):
        encode_with(folder, shards / "raw", out, frames=8)
    with pytest.raises(UserError, match=r"text\.length = 2 tokens"):
        encode_with(folder, shards / "raw", out, text=umt5(folder, length=2))
    with pytest.raises(UserError, match=r"set text\.dim=24"):
        encode_with(folder, shards / "raw", out, text=umt5(folder, dim=32))
    (copy / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="must hold the whole weights of AutoencoderKLWan"):
        encode_with(folder, shards / "raw", out, codec=wan_codec(copy))
    assert not out.exists()


def test_a_complete_set_is_left_alone_without_loading_networks(
    folder, shards, tmp_path, monkeypatch
):
    shutil.copytree(folder, tmp_path / "moved")
    monkeypatch.setattr("data.ingest.build_codec", lambda *_: pytest.fail("a network was loaded"))
    before = {p.name: p.stat().st_mtime_ns for p in (shards / "latents").iterdir()}
    encode_with(tmp_path / "moved", shards / "raw", shards / "latents")
    assert {p.name: p.stat().st_mtime_ns for p in (shards / "latents").iterdir()} == before


def test_windows_begin_with_a_latent_frame_that_stands_for_one_pixel_frame(shards):
    settings = {"batch_size": 3, "frames": 2, "seed": 1, "num_batches": 6}
    latents = ShardSet(shards / "latents")
    clips = {(s := read_sample(latents, index)).key: s for index in range(len(latents))}
    for batch in LatentDataModule(shards / "latents", **settings).train_dataloader():
        for key, found, meta in zip(batch.keys, batch.latents, batch.meta, strict=True):
            assert torch.equal(found, clips[key].latents[:2])
            assert meta["start"] == meta["clip_start"]
    for clip in clips.values():
        assert torch.equal(target_window(clip, 2).latents, clip.latents[:2])
    # Latent frame 2 begins with the clip's pixel frame 5, every second of the video's from 3 on.
    clip = read_sample(latents, 1)
    assert [clip.window(start, 1).meta["start"] for start in (0, 1, 2)] == [3, 3 + 2, 3 + 2 * 5]
