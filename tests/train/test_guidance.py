"""What the teacher is asked when its estimate is guided."""

import pytest
import torch

from tests.train.small_stages import batch, build
from train.losses import guided

NEGATIVE = torch.arange(24.0).view(3, 8) / 10


def texts_seen(stage, step: int = 0) -> list[torch.Tensor]:
    """The text of every pass of the teacher in a step that updates the student."""
    seen: list[torch.Tensor] = []
    stage.frozen["teacher"].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    stage.update(batch(), step)
    return seen


@pytest.mark.parametrize("kind", ["distill", "streaming"])
def test_a_guided_teacher_is_asked_under_the_caption_and_under_the_negative_prompt(kind):
    stage = build(kind, {"guidance_scale": 3.0}, negative_text=NEGATIVE)
    with_caption, without = texts_seen(stage)
    assert torch.equal(with_caption, batch().text)
    assert without.shape == with_caption.shape
    assert all(torch.equal(rows, NEGATIVE) for rows in without)


@pytest.mark.parametrize("kind", ["distill", "streaming"])
def test_without_guidance_no_negative_prompt_is_needed(kind):
    (text,) = texts_seen(build(kind, {"guidance_scale": 1.0}))
    assert torch.equal(text, batch().text)


def test_the_direction_is_that_of_both_estimates(monkeypatch):
    stage = build("distill", {"guidance_scale": 3.0}, negative_text=NEGATIVE)
    asked, combined = [], []
    stage.frozen["teacher"].register_forward_hook(lambda *found: asked.append(found[-1]))
    monkeypatch.setattr(
        "train.distill.guided", lambda *args: combined.append(args) or guided(*args)
    )
    stage.update(batch(), 0)
    ((conditional, unconditional, scale),) = combined
    assert scale == 3.0
    assert conditional is asked[0]
    assert unconditional is asked[1]
    assert not torch.equal(conditional, unconditional)


def test_the_negative_prompt_is_in_no_checkpoint():
    stage = build("distill", {"guidance_scale": 3.0}, negative_text=NEGATIVE)
    assert not [name for name in stage.snapshot().tensors if "negative" in name]
    assert "negative_text" not in stage.state_dict()
