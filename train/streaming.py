"""Stage `streaming`: the few-step student is tuned on its own long rollouts, policy in the loop.

A stream is a batch of videos that grow chunk by chunk over many steps, with the cache policy that
will be used at inference. Each step adds a chunk; distribution matching judges a window that ends
with it. A stream that has reached its length gives way to a new one.

Source: streaming long tuning, LongLive, arXiv:2509.22622; the cache policy is PaFu-KV's.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.datamodule import LatentBatch
from models.kv_cache import CacheSpec, KVCache
from models.kv_policy import build_policy
from models.rollout import NoiseSource, make_cache, recache, refresh
from train.distill import DistributionMatching
from train.randomness import derive_seeds, step_integer


@dataclass
class StreamingParams:
    """Settings of the stage; the first ones as in `train.distill.DistillParams`.

    Attributes:
        student_steps: Network passes per block.
        student_shift: Shift of their noise levels.
        score_shift: Shift of the noise levels at which teacher and critic judge.
        score_range: Lowest and highest of those noise levels.
        guidance_scale: Of the teacher's estimate; 1 = off.
        student_every: The student is updated every so many chunks.
        policy: Cache policy.
        policy_params: Of the policy.
        budget_tokens: Tokens per layer.
        sink_frames: Frames never evicted.
        time: `absolute` or `relative` frame numbers, see `models.kv_cache.CacheSpec`.
        max_lag: Longest lag shown by `relative` time.
        prefix_frames: True frames at the start of a stream, at least one block.
        chunk_frames: Frames added per step.
        stream_frames: Length at which a stream ends.
        switch_chance: Chance that a stream changes its prompt once, in its middle.
    """

    student_steps: int = 2
    student_shift: float = 5.0
    score_shift: float = 3.0
    score_range: list[float] = field(default_factory=lambda: [0.02, 0.98])
    guidance_scale: float = 1.0
    student_every: int = 2
    policy: str = "salience"
    policy_params: dict[str, Any] = field(default_factory=dict)
    budget_tokens: int = 128
    sink_frames: int = 1
    time: str = "absolute"
    max_lag: int = 47
    prefix_frames: int = 24
    chunk_frames: int = 24
    stream_frames: int = 240
    switch_chance: float = 0.0


@dataclass
class Stream:
    """A growing batch of videos.

    Attributes:
        cache: Its past.
        noise: Its noise.
        text: Prompt in force.  [B, T, text_dim]
        history: Last frames, at most a scoring window.  [B, F, C, H, W]
        sink: First block, for a re-cache.  [B, F, C, H, W]
        switch_frame: Where the prompt changes; 0 = never.
        next_text: Prompt after that.  [B, T, text_dim]
    """

    cache: KVCache
    noise: NoiseSource
    text: Tensor
    history: Tensor
    sink: Tensor
    switch_frame: int
    next_text: Tensor


class Streaming(DistributionMatching):
    """Trains `student` and `critic` on persistent rollouts; the head is frozen."""

    params: StreamingParams
    params_type = StreamingParams
    frozen_roles = ("teacher", "head")
    export_role = "student"
    exported = {"transformer": "student", "critic": "critic", "head": "head"}
    restarts_at_snapshot = True

    def setup_stage(self) -> None:
        """No stream yet: the first step starts one."""
        self.stream: Stream | None = None

    def start_stream(self, batch: LatentBatch, step: int) -> Stream:
        """Streams that continue the first true frames of a batch."""
        params, size = self.params, self.frames_per_block
        seeds = derive_seeds(batch.seeds, "stream")
        cache = make_cache(
            self.engine("student").module,
            spec=CacheSpec(
                budget_tokens=params.budget_tokens,
                tokens_per_frame=self.frame_seq_len,
                frames_per_block=size,
                sink_frames=params.sink_frames,
                recent_frames=size,
                time=params.time,
                max_lag=params.max_lag,
            ),
            policy=build_policy(params.policy, params.policy_params),
            seeds=seeds.to(batch.latents.device),
            sampler=self.sampler(),
            head=self.frozen["head"],
        )
        prefix = batch.latents[:, : params.prefix_frames]
        for block in prefix.split(size, dim=1):
            refresh(self.engine("student"), batch.text, block, cache=cache)
        return Stream(
            cache=cache,
            noise=NoiseSource(seeds),
            text=batch.text,
            history=prefix,
            sink=prefix[:, : -(-max(params.sink_frames, 1) // size) * size],
            switch_frame=self._draw_switch(step),
            next_text=batch.text.roll(1, dims=0),
        )

    def _draw_switch(self, step: int) -> int:
        """A chunk start in the stream, or 0; ranks agree, so that all re-cache together."""
        params = self.params
        if step_integer(self.seed, step, "switch", high=1 << 20) >= params.switch_chance * (1 << 20):
            return 0
        chunks = (params.stream_frames - params.prefix_frames) // params.chunk_frames
        chunk = 1 + step_integer(self.seed, step, "switch chunk", high=max(1, chunks - 1))
        return params.prefix_frames + chunk * params.chunk_frames

    def update(self, batch: LatentBatch, step: int) -> dict[str, Tensor | float]:
        """One chunk: critic step, preceded by a student step when due."""
        params = self.params
        if self.stream is None:
            self.mark_restart_point()
            self.stream = self.start_stream(batch, step)
        stream = self.stream
        if stream.switch_frame and stream.cache.num_frames == stream.switch_frame:
            stream.text = stream.next_text
            recache(
                self.engine("student"),
                stream.text,
                stream.history,
                cache=stream.cache,
                sink=stream.sink,
            )
        train_student = self.trains_student(step)
        chunk = self.roll(
            stream.cache,
            stream.text,
            stream.noise,
            num_frames=params.chunk_frames,
            latent_shape=tuple(stream.history.shape[2:]),
            step=step,
            grad=train_student,
        )
        window_frames = batch.latents.shape[1]
        window = torch.cat([stream.history, chunk], dim=1)[:, -window_frames:]
        mask = torch.arange(window.shape[1], device=window.device)
        mask = mask >= window.shape[1] - params.chunk_frames
        seeds = derive_seeds(batch.seeds, "chunk", stream.cache.num_frames)
        metrics: dict[str, Tensor | float] = {"stream_frames": float(stream.cache.num_frames)}
        if train_student:
            metrics |= self.student_step(window, stream.text, seeds, mask)
        metrics |= self.critic_step(window, stream.text, seeds, mask)
        stream.history = window.detach()
        if stream.cache.num_frames + params.chunk_frames > params.stream_frames:
            self.stream = None
        return metrics

    @torch.no_grad()
    def preview(self, batch: LatentBatch) -> Tensor | None:
        """The last window of the running streams.  [B, F, C, H, W]"""
        return None if self.stream is None else self.stream.history
