import pytest
import torch

from configs.errors import UserError
from data.codec import TransformCodec


@pytest.mark.parametrize(("stride", "channels"), [(16, 16), (16, 3), (4, 48), (2, 12), (8, 40)])
def test_decode_then_encode_is_the_identity_on_latents(stride, channels):
    codec = TransformCodec(stride, channels)
    latents = torch.randn(2, 3, channels, 2, 5)
    again = codec.encode(codec.decode(latents))
    torch.testing.assert_close(again, latents, rtol=1e-5, atol=1e-5)  # float32 rounding


def test_all_channels_are_an_exact_inverse_in_both_directions():
    codec = TransformCodec(4, 48)
    frames = torch.rand(3, 3, 8, 12) * 2 - 1
    torch.testing.assert_close(codec.decode(codec.encode(frames)), frames, rtol=0, atol=1e-5)


def test_each_kept_coefficient_is_a_plain_cosine_sum():
    frames = torch.rand(1, 3, 32, 16, dtype=torch.float64) * 2 - 1
    latents = TransformCodec(16, 16).encode(frames)
    # channel 2 = frequency (0, 0) of (1, 1, -2): sum over the cell, times 1/16 for the two
    # constant waves of norm 1, 1/sqrt(6) for the colour and 2/16 for the scale
    cell = frames[0, :, 16:]
    wanted = (cell[0] + cell[1] - 2 * cell[2]).sum() / 6**0.5 / 16 * 2 / 16
    torch.testing.assert_close(latents[0, 2, 1, 0].double(), wanted, rtol=0, atol=1e-5)


def test_the_first_twelve_channels_hold_the_low_frequencies_of_every_colour():
    wave = torch.cos(torch.pi * (torch.arange(16) + 0.5) / 16)
    shapes = [torch.ones(16, 16), wave.expand(16, 16), wave[:, None].expand(16, 16)]
    shapes.append(wave[:, None] * wave)
    codec = TransformCodec(16, 12)
    for shape in shapes:
        for color in torch.eye(3):
            frame = 0.7 * color[:, None, None] * shape
            torch.testing.assert_close(codec.decode(codec.encode(frame)), frame, rtol=0, atol=1e-5)


def test_a_cell_of_strong_colour_has_values_of_order_one():
    frame = torch.tensor([0.8, -0.8, -0.8])[:, None, None].expand(3, 16, 16)
    assert 0.5 < TransformCodec(16, 16).encode(frame).abs().max() < 3


def test_cells_do_not_mix_and_axes_are_not_swapped():
    codec = TransformCodec(16, 16)
    frames = torch.zeros(3, 32, 64)
    frames[:, :16, 48:] = torch.rand(3, 16, 16)
    latents = codec.encode(frames)
    assert latents.shape == (16, 2, 4)
    assert latents[:, 0, 3].abs().min() > 0
    assert latents.abs().sum() == latents[:, 0, 3].abs().sum()
    ramp = torch.linspace(-1, 1, 16).expand(3, 16, 16)  # changes along x only
    moved = codec.encode(ramp)[3:9, 0, 0].reshape(2, 3)  # (0, 1), then (1, 0)
    assert moved[0, 0].abs() > 0.5
    assert moved[1].abs().max() < 1e-6


def test_bad_shapes_and_names_say_what_to_do():
    codec = TransformCodec(16, 16)
    with pytest.raises(ValueError, match=r"source\.size"):
        codec.encode(torch.zeros(3, 30, 64))
    with pytest.raises(ValueError, match="3, H, W"):
        codec.encode(torch.zeros(4, 32, 64))
    with pytest.raises(ValueError, match="16, h, w"):
        codec.decode(torch.zeros(15, 2, 4))
    with pytest.raises(UserError, match=r"codec\.channels"):
        TransformCodec(2, 13)
