import pytest
import torch

from configs.errors import UserError
from configs.schema import TextConfig
from data.text import build_text

GONDOLA = [-0.0140795, -0.6855229, 0.727915]


def test_words_become_unit_vectors_in_order_and_the_rest_is_zero():
    rows, words = build_text(TextConfig(dim=7, length=5))("Red, blue-red!")
    assert words == 3
    assert rows.shape == (5, 7)
    torch.testing.assert_close(rows[:3].norm(dim=1), torch.ones(3))
    assert rows[3:].abs().max() == 0
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])


def test_vectors_never_change():
    rows, _ = build_text(TextConfig(dim=3, length=1))("gondola")
    # recorded once; a change would break every trained model
    torch.testing.assert_close(rows[0], torch.tensor(GONDOLA), rtol=0, atol=1e-6)


def test_no_words_and_too_many_words():
    text = build_text(TextConfig(dim=4, length=2))
    rows, words = text("")
    assert words == 0
    assert rows.abs().max() == 0
    with pytest.raises(UserError, match=r"text\.length = 2"):
        text("one two three")
    assert text.count("one two") == 2
    with pytest.raises(UserError, match="found 3 in 'one two three'"):
        text.count("one two three")
