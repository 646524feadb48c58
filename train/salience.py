"""Stage `salience`: the S-MLP learns the teacher's salience from the student's clean pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.batches import LatentBatch, TargetBatch
from models.attention import block_causal_mask
from models.flow import add_noise
from models.rollout import VelocityModel
from models.salience import PARTS, SalienceHead, head_scores
from models.salience_targets import SalienceCapture, mask_short_future
from models.transformer import VideoTransformer
from train.kinds import SalienceKind, SalienceParams
from train.losses import salience_ranking_loss, salience_regression_loss
from train.randomness import sample_noise, step_integer
from train.ranks import gather_objects
from train.stage import Stage


@torch.no_grad()
def salience_of(
    teacher: VideoTransformer,
    latents: Tensor,
    text: Tensor,
    *,
    seeds: Tensor,
    sigma: float,
    block_len: int,
) -> Tensor:
    """Salience of every token of clean videos in the teacher's attention to noisy ones.

    Args:
        teacher: Bidirectional.
        latents: Clean.  [B, F, C, H, W]
        text: Captions.  [B, T, text_dim]
        seeds: Of the noise of each sample, on the CPU.  [B]
        sigma: Noise level.
        block_len: Tokens of a block.

    Returns:
        As `models.salience_targets.attend_with_targets`, for every layer.  [L, B, S, 3]
    """
    noise = sample_noise(latents.shape[1:], seeds, "salience noise", device=latents.device)
    level = latents.new_full(latents.shape[:2], sigma)
    with SalienceCapture(teacher, block_len) as captured:
        teacher(add_noise(latents, noise, level), level, text, wanted=0)
    return captured.targets


@torch.no_grad()
def clean_hidden(
    student: VelocityModel,
    latents: Tensor,
    text: Tensor,
    *,
    frames_per_block: int,
    block_len: int,
) -> list[Tensor]:
    """Input of every layer of a student in a clean block-causal pass.

    Args:
        student: Block-causal.
        latents: Clean.  [B, F, C, H, W]
        text: Captions.  [B, T, text_dim]
        frames_per_block: Latent frames of a block.
        block_len: Tokens of a block.

    Returns:
        L x [B, S, E]
    """
    mask = block_causal_mask(latents.shape[1] // frames_per_block, block_len).to(latents.device)
    found: list[Tensor] = []
    student(
        latents,
        latents.new_zeros(latents.shape[:2]),
        text,
        mask=mask,
        capture=lambda layer, hidden, queries, keys: found.append(hidden),
        wanted=0,
    )
    return found


def later_map(head: SalienceHead, hidden: list[Tensor]) -> Tensor:
    """The head's `later`, mean over layers, from `clean_hidden`.  [B, F, rows, columns]."""
    later = torch.stack(head(hidden))[..., PARTS.index("later")].mean(dim=0)
    return later.unflatten(1, (-1, *head.place.shape[1:3]))


class SalienceStage(SalienceKind, Stage):
    """Trains the network `head`; teacher and student are frozen, nothing reaches the student."""

    params: SalienceParams

    def setup_stage(self) -> None:
        """Start without statistics of targets."""
        self.sums: Tensor | None = None

    def targets(self, batch: LatentBatch) -> Tensor:
        """Salience of every token in the teacher's attention, stored or asked.  [L, B, S, 3]."""
        if isinstance(batch, TargetBatch):
            found = batch.targets.transpose(0, 1)
        else:
            found = self.ask_teacher(batch)
        return mask_short_future(found, self.block_len, self.params.horizon)

    def ask_teacher(self, batch: LatentBatch) -> Tensor:
        """Salience as the teacher's attention has it, short futures included.  [L, B, S, 3]."""
        teacher = self.frozen["teacher"]
        assert isinstance(teacher, VideoTransformer)
        return salience_of(
            teacher,
            batch.latents,
            batch.text,
            seeds=batch.seeds,
            sigma=self.params.sigma,
            block_len=self.block_len,
        )

    def hidden(self, batch: LatentBatch) -> list[Tensor]:
        """What the head reads.  L x [B, S, E]."""
        return clean_hidden(
            self.frozen["student"],
            batch.latents,
            batch.text,
            frames_per_block=self.frames_per_block,
            block_len=self.block_len,
        )

    def preview(self, batch: LatentBatch) -> Tensor:
        """True videos: what the head looks at.  [B, F, C, H, W]."""
        return batch.latents

    @torch.no_grad()
    def preview_salience(self, batch: LatentBatch) -> Tensor:
        """The head in training on them.  [B, F, rows, columns]."""
        head: SalienceHead = self.engine("head").module
        return later_map(head, self.hidden(batch))

    def step_kind(self, step: int) -> str:
        """Whether the step gathers statistics or trains."""
        return "statistics" if step < self.params.statistics_steps else "training"

    def update(self, batch: LatentBatch, step: int) -> dict[str, Tensor | float]:
        """Gather statistics in the first steps, then one step of the head."""
        if step < self.params.statistics_steps:
            with self.spans("score"):
                for part in self.micro_batches(batch):
                    self.add_sums(self.engine("head").module.sums(self.targets(part)).cpu())
            if step == self.params.statistics_steps - 1:
                self.fit_statistics()
            return {}
        shift = 1 + step_integer(self.seed, step, "pairs", high=self.num_tokens(batch) - 1)
        metrics: dict[str, Tensor | float] = {}

        def loss(part: LatentBatch) -> Tensor:
            predicted, wanted = self.predict(part)
            if step % self.config.log_every == 0 and not metrics:
                metrics.update(self.scores(predicted, wanted))
            pairs = list(zip(predicted, wanted, strict=True))
            regression = torch.stack([salience_regression_loss(p, w) for p, w in pairs]).mean()
            if self.params.ranking_weight == 0:
                return regression
            ranking = [salience_ranking_loss(p, w, shift=shift) for p, w in pairs]
            return regression + self.params.ranking_weight * torch.stack(ranking).mean()

        return self.optimise("head", loss, self.micro_batches(batch)) | metrics

    def num_tokens(self, batch: LatentBatch) -> int:
        """Tokens of a clip."""
        return batch.latents.shape[1] * self.frame_seq_len

    def predict(self, batch: LatentBatch) -> tuple[list[Tensor], list[Tensor]]:
        """The head's predictions and what they should be, per layer.  L x [B, S, 3]."""
        head: SalienceHead = self.engine("head").module
        targets = self.targets(batch)
        wanted = [head.standardise(layer, target) for layer, target in enumerate(targets)]
        return self.engine("head")(self.hidden(batch)), wanted

    def add_sums(self, sums: Tensor) -> None:
        """Count clips in; see `models.salience.SalienceHead.sums`."""
        self.sums = sums if self.sums is None else self.sums + sums

    def fit_statistics(self) -> None:
        """Standardise by what all ranks have seen."""
        found = [sums for sums in gather_objects(self.sums) if sums is not None]
        head: SalienceHead = self.engine("head").module
        head.fit_statistics(torch.stack(found).sum(dim=0).to(self.device))
        self.sums = None

    def scores(self, predicted: list[Tensor], wanted: list[Tensor]) -> dict[str, Tensor | float]:
        """Spearman and recall per layer and part, on this batch before its step."""
        metrics: dict[str, Tensor | float] = {}
        for layer, (p, w) in enumerate(zip(predicted, wanted, strict=True)):
            for part, score in zip(PARTS, head_scores(p, w, self.params.budget_share), strict=True):
                metrics[f"spearman/{part}/{layer}"] = score.spearman
                metrics[f"recall/{part}/{layer}"] = score.recall
        return metrics

    def extra_state(self) -> dict[str, Tensor]:
        """What the targets so far add up to, where the statistics are not made yet."""
        return {} if self.sums is None else {"sums": self.sums}

    def load_extra_state(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Counterpart of `extra_state`."""
        self.sums = None
        for state in states:
            if "sums" in state:
                self.add_sums(state["sums"])
