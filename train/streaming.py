"""Stage `streaming`: the few-step student is tuned on its own long rollouts, policy in the loop.

A stream is a batch of videos that grow chunk by chunk over many steps, with the cache policy that
will be used at inference. Each step adds a chunk; distribution matching judges a window that ends
with it. A stream that has reached its length gives way to a new one.

Source: streaming long tuning, LongLive, arXiv:2509.22622; the cache policy is PaFu-KV's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.load import to_dict
from data.batches import LatentBatch, SwitchBatch
from models.kv_cache import KVCache
from models.kv_policies import build_policy
from models.kv_spec import CacheSpec
from models.rollout import NoiseSource, make_cache, recache, refresh
from models.salience import SalienceHead
from train.distill import DistributionMatching
from train.kinds import StreamingKind, StreamingParams
from train.randomness import derive_seeds, step_integer
from train.salience import clean_hidden, later_map


@dataclass
class Stream:
    """A growing batch of videos.

    Attributes:
        cache: Its past.
        noise: Its noise.
        seeds: Of its samples.  [B]
        text: Prompt in force.  [B, T, text_dim]
        history: Last frames, at most a scoring window.  [B, F, C, H, W]
        sink: First block, for a re-cache.  [B, F, C, H, W]
        switch_frame: Where the prompt changes; 0 = never.
        next_text: Prompt after that.  [B, T, text_dim]
    """

    cache: KVCache
    noise: NoiseSource
    seeds: Tensor
    text: Tensor
    history: Tensor
    sink: Tensor
    switch_frame: int
    next_text: Tensor


class Streaming(StreamingKind, DistributionMatching):
    """Trains `student` and `critic` on persistent rollouts; the head is frozen."""

    params: StreamingParams

    def setup_stage(self) -> None:
        """No stream yet: the first step starts one per micro-batch."""
        self.streams: list[Stream] = []
        self._first_batch: LatentBatch | None = None
        self._shown: tuple[Tensor, Tensor] | None = None
        """Last window and prompt of the first micro-batch, for previews."""

    def cache_policy(self) -> dict[str, Any]:
        """Policy and geometry of the cache of its streams."""
        policy = build_policy(self.params.policy, self.params.policy_params)
        return {"name": policy.name, "params": to_dict(vars(policy)), **self._cache_sizes()}

    def _cache_sizes(self) -> dict[str, Any]:
        params = self.params
        return {
            "budget_tokens": params.budget_tokens,
            "sink_frames": params.sink_frames,
            "recent_frames": self.frames_per_block,
            "time": params.time,
            "max_lag": params.max_lag,
        }

    def start_stream(self, batch: LatentBatch, step: int) -> Stream:
        """Streams that continue the first true frames of a batch."""
        params, size = self.params, self.frames_per_block
        seeds = derive_seeds(batch.seeds, "stream")
        head = self.frozen["head"]
        assert isinstance(head, SalienceHead)
        cache = make_cache(
            self.engine("student").module,
            spec=CacheSpec(
                tokens_per_frame=self.frame_seq_len,
                frames_per_block=size,
                **self._cache_sizes(),
            ),
            policy=build_policy(params.policy, params.policy_params),
            seeds=seeds.to(batch.latents.device),
            head=head,
        )
        prefix = batch.latents[:, : params.prefix_frames]
        for block in prefix.split(size, dim=1):
            refresh(self.engine("student"), batch.text, block, cache=cache)
        return Stream(
            cache=cache,
            noise=NoiseSource(seeds.to(batch.latents.device)),
            seeds=seeds,
            text=batch.text,
            history=prefix,
            sink=prefix[:, : -(-max(params.sink_frames, 1) // size) * size],
            switch_frame=self._draw_switch(step),
            next_text=batch.next_text if isinstance(batch, SwitchBatch) else batch.text,
        )

    def batch_at_work(self, batch: LatentBatch) -> LatentBatch:
        """The batch that the running streams began with."""
        return self._first_batch if self.streams and self._first_batch is not None else batch

    def _draw_switch(self, step: int) -> int:
        """A chunk start in the stream, or 0; ranks agree, so that all re-cache together."""
        params = self.params
        drawn = step_integer(self.seed, step, "switch", high=1 << 20) / (1 << 20)
        if drawn >= params.switch_chance:
            return 0
        chunks = (params.stream_frames - params.prefix_frames) // params.chunk_frames
        chunk = 1 + step_integer(self.seed, step, "switch chunk", high=max(1, chunks - 1))
        return params.prefix_frames + chunk * params.chunk_frames

    def update(self, batch: LatentBatch, step: int) -> dict[str, Tensor | float]:
        """One chunk: critic step, preceded by a student step when due."""
        if not self.streams:
            self.mark_restart_point()
            self._first_batch = batch
        with self.spans("rollout"):
            self.prepare_streams(batch, step)
        train_student, frames = self.trains_student(step), batch.latents.shape[1]
        metrics: dict[str, Tensor | float] = {}

        def student(stream: Stream) -> Tensor:
            with self.spans("rollout"):
                window = self.next_window(stream, step, frames, grad=True)
            return self.student_loss(window, stream.text, *self.score_inputs(stream))

        def critic(stream: Stream) -> Tensor:
            return self.critic_loss(stream.history, stream.text, *self.score_inputs(stream))

        if train_student:
            metrics |= self.optimise("student", student, self.streams)
        else:
            with self.spans("rollout"):
                for stream in self.streams:
                    self.next_window(stream, step, frames, grad=False)
        metrics |= self.optimise("critic", critic, self.streams)
        self._shown = self.streams[0].history, self.streams[0].text
        length = self.streams[0].cache.num_frames
        if length + self.params.chunk_frames > self.params.stream_frames:
            self.streams = []
        return metrics | {"stream_frames": float(length)}

    def prepare_streams(self, batch: LatentBatch, step: int) -> None:
        """Start streams if there are none; change their prompts if it is time."""
        if not self.streams:
            self.streams = [self.start_stream(part, step) for part in self.micro_batches(batch)]
        for stream in self.streams:
            self.switch_prompt(stream)

    def step_kind(self, step: int) -> str:
        """With what the cache holds and whether it is rebuilt, on which arithmetic depends."""
        kind = super().step_kind(step)
        if not self.streams:
            return f"{kind}, new"
        cache, stream = self.streams[0].cache, self.streams[0]
        switches = cache.num_frames == stream.switch_frame
        window = stream.history.shape[1]
        return f"{kind}, {cache.num_tokens} tokens, window {window}, switch {switches}"

    def next_window(self, stream: Stream, step: int, frames: int, *, grad: bool) -> Tensor:
        """Grow a stream by one chunk; its last `frames` frames, with gradient in the chunk."""
        chunk = self.roll(
            stream.cache,
            stream.text,
            stream.noise,
            num_frames=self.params.chunk_frames,
            latent_shape=tuple(stream.history.shape[2:]),
            step=step,
            grad=grad,
        )
        window = torch.cat([stream.history, chunk], dim=1)[:, -frames:]
        stream.history = window.detach()
        return window

    def score_inputs(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Seeds of the noise for judging the newest chunk, and the mask of that chunk."""
        seeds = derive_seeds(stream.seeds, "chunk", stream.cache.num_frames)
        size = stream.history.shape[1]
        mask = torch.arange(size, device=stream.history.device) >= size - self.params.chunk_frames
        return seeds, mask

    def switch_prompt(self, stream: Stream) -> None:
        """Change the prompt and rebuild the past under it, if it is time."""
        if stream.switch_frame and stream.cache.num_frames == stream.switch_frame:
            stream.text = stream.next_text
            recache(
                self.engine("student"),
                stream.text,
                stream.history,
                cache=stream.cache,
                sink=stream.sink,
            )

    @torch.no_grad()
    def preview(self, batch: LatentBatch) -> Tensor | None:
        """The last window of the running streams, or of those that just ended.  [B, F, C, H, W]."""
        return self._shown[0] if self._shown is not None else None

    @torch.no_grad()
    def preview_salience(self, batch: LatentBatch) -> Tensor | None:
        """The head on that window, as if nothing had come before.  [B, F, rows, columns]."""
        if self._shown is None:
            return None
        (window, text), head = self._shown, self.frozen["head"]
        assert isinstance(head, SalienceHead)
        hidden = clean_hidden(
            self.engine("student"),
            window,
            text,
            frames_per_block=self.frames_per_block,
            block_len=self.block_len,
        )
        return later_map(head, hidden)
