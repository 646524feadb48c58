"""The negative prompt is encoded once, as captions are, and only the right one is read."""

import shutil

import pytest
import torch

from configs.errors import UserError
from configs.schema import TextConfig
from data.negative import read_negative, write_negative
from data.shards import BadSample, BadShard, ShardSet
from data.text import build_text, text_identity
from tests.data.wan_parts import DIM, LENGTH, umt5, write_text

BLUR = "blur, low quality"


def read(root, sets, negative=BLUR):
    return read_negative(root, clips=ShardSet(sets / "latents"), negative=negative)


@pytest.fixture(scope="module")
def blur(tmp_path_factory):
    """The encoded prompt `BLUR`; read only."""
    root = tmp_path_factory.mktemp("negative") / "blur"
    write_negative(root, text=TextConfig(negative=BLUR))
    return root


@pytest.mark.parametrize("prompt", [BLUR, "", "blur"])
def test_what_is_read_is_what_the_encoder_says_of_the_prompt(sets, tmp_path, prompt):
    config = TextConfig(negative=prompt)
    write_negative(tmp_path / "negative", text=config)
    found = read(tmp_path / "negative", sets, prompt)
    assert found.dtype == torch.float32
    assert torch.equal(found, build_text(config)(prompt)[0])
    assert bool(found.any()) is bool(prompt), "the empty prompt of `hashed` is a caption of zeros"


@pytest.mark.parametrize("prompt", ["a large street", ""])
def test_umt5_encodes_the_prompt_as_a_caption(tmp_path, prompt):
    from data.shard_writer import ShardSetWriter

    write_text(tmp_path / "wan")
    config = umt5(tmp_path / "wan", negative=prompt)
    write_negative(tmp_path / "negative", text=config)
    properties = {"text": text_identity(config)}
    clips = tmp_path / "latents"
    with ShardSetWriter(clips, samples_per_shard=1, source_hash="x", properties=properties):
        pass
    found = read_negative(tmp_path / "negative", clips=ShardSet(clips), negative=prompt)
    assert found.shape == (LENGTH, DIM)
    rows, words = build_text(umt5(tmp_path / "wan"))(prompt)
    assert torch.equal(found, rows)
    assert words > 0, "its end is a token also of the empty prompt"
    assert ShardSet(tmp_path / "negative").read(0).keys() == {"text.safetensors"}


def test_vectors_of_captions_do_not_depend_on_the_negative_prompt():
    assert text_identity(TextConfig(negative=BLUR)) == text_identity(TextConfig())


def test_a_complete_one_is_left_alone_and_another_prompt_replaces_it(sets, blur, tmp_path):
    root = tmp_path / "negative"
    shutil.copytree(blur, root)
    before = {path.name: path.stat().st_mtime_ns for path in root.iterdir()}
    write_negative(root, text=TextConfig(negative=BLUR))
    assert {path.name: path.stat().st_mtime_ns for path in root.iterdir()} == before
    write_negative(root, text=TextConfig(negative="noise"))
    assert {path.name for path in root.iterdir()} == before.keys()
    assert torch.equal(read(root, sets, "noise"), build_text(TextConfig())("noise")[0])
    with pytest.raises(BadShard, match=r"negative 'noise' in place of 'blur, low quality'.*encode"):
        read(root, sets)


def test_a_writer_that_was_killed_before_its_end_is_continued(blur, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.shard_writer.json_sha256", killed)
    with pytest.raises(KeyboardInterrupt):
        write_negative(tmp_path / "negative", text=TextConfig(negative=BLUR))
    monkeypatch.undo()
    assert (tmp_path / "negative" / "shard-000000.tar").is_file()
    with pytest.raises(BadShard, match=r"found no manifest\.json"):
        ShardSet(tmp_path / "negative")
    write_negative(tmp_path / "negative", text=TextConfig(negative=BLUR))
    found = {path.name: path.read_bytes() for path in (tmp_path / "negative").iterdir()}
    assert found == {path.name: path.read_bytes() for path in blur.iterdir()}


def test_a_prompt_that_is_too_long_and_files_of_others_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"at most text\.length = 2 words, found 3 in 'blur, low"):
        write_negative(tmp_path / "negative", text=TextConfig(length=2, negative=BLUR))
    assert not (tmp_path / "negative").exists()
    (tmp_path / "note.txt").touch()
    with pytest.raises(UserError, match=r"must be empty or hold what .* found note\.txt"):
        write_negative(tmp_path, text=TextConfig(negative=BLUR))


def test_without_it_the_error_says_to_encode_again(sets, tmp_path):
    message = r"guidance_scale other than 1 needs .*text\.negative: .*; run `encode` again"
    with pytest.raises(BadShard, match=message):
        read(tmp_path / "negative", sets)


def test_vectors_of_another_encoder_than_the_captions_are_refused(sets, tmp_path):
    write_negative(tmp_path / "negative", text=TextConfig(length=9, negative=BLUR))
    with pytest.raises(BadShard, match=r"encoded as the captions of .*'length': 9.*'length': 12"):
        read(tmp_path / "negative", sets)


def test_damaged_bytes_are_an_error(sets, blur, tmp_path):
    shutil.copytree(blur, tmp_path / "negative")
    offset, size, _ = ShardSet(blur).entry(0).members["text.safetensors"]
    shard = tmp_path / "negative" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[offset + size - 1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BadSample, match=r"negative\.text\.safetensors must be"):
        read(tmp_path / "negative", sets)
