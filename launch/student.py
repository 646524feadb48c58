"""A trained student as sampling and evaluation use it: network, head, codec, text, sampler."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.load import parse_section
from configs.schema import CodecConfig, TextConfig
from data.codec import Codec, build_codec
from data.text import build_text
from launch.export import Export, load_export, load_weights
from models.flow import sampling_sigmas
from models.kv_cache import KVCache
from models.kv_policy import CachePolicy
from models.kv_spec import CacheSpec
from models.rollout import Sampler, VelocityModel, make_cache
from models.salience import SalienceHead
from models.transformer import VideoTransformer

PRECISIONS = ("fp32", "bf16")
"""Of the arithmetic of a network, as in `trainer.precision`."""


@dataclass
class Student:
    """What an export of a student holds, rebuilt.

    Attributes:
        export: Where it came from.
        network: In evaluation mode.
        head: Salience head, if the stage that wrote the export had one.
        sampler: Noise levels it was trained or chosen for.
        codec_config: How latents come from and go to pixels.
        text_config: How captions become vectors.
        device: Where its codec and text encoder compute, if they are networks.
        grid: Token (rows, columns) of a frame.
        frames_per_block: Frames generated together.
        size: Height and width in pixels.
        fps: Frames per second of its videos.
        every: Every how many frames of a video file it has seen one.
        precision: One of `PRECISIONS`, in which it was trained; None if its export does not say.
    """

    export: Export
    network: VideoTransformer
    head: SalienceHead | None
    sampler: Sampler
    codec_config: CodecConfig
    text_config: TextConfig
    device: torch.device | str
    grid: tuple[int, int]
    frames_per_block: int
    size: tuple[int, int]
    fps: float
    every: int
    precision: str | None

    @functools.cached_property
    def codec(self) -> Codec:
        """Latents from and to pixels; built when it is first asked for."""
        return build_codec(self.codec_config, self.device)

    def encode_texts(self, texts: Sequence[str]) -> list[Tensor]:
        """Vectors of captions, on the CPU, [1, T, E] each; the encoder lives only in this call.

        Raises:
            UserError: If a caption is too long, or the encoder's weights are not there.
        """
        encoder = build_text(self.text_config, self.device)
        return [encoder(text)[0][None] for text in texts]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent frame."""
        height, width = (pixels // self.codec_config.stride for pixels in self.size)
        return self.codec_config.channels, height, width

    @property
    def frame_seq_len(self) -> int:
        """Tokens per latent frame."""
        return self.grid[0] * self.grid[1]

    def with_steps(self, num_steps: int, *, shift: float) -> Sampler:
        """The student's rule of sampling with another number of steps."""
        return Sampler(sampling_sigmas(num_steps, shift), renoise=self.sampler.renoise)

    def cache_spec(self, *, budget_tokens: int, **more: Any) -> CacheSpec:
        """Geometry of a cache for its videos; more fields as in `models.kv_spec.CacheSpec`.

        Raises:
            ValueError: If the fields contradict each other.
        """
        return CacheSpec(
            budget_tokens=budget_tokens,
            tokens_per_frame=self.frame_seq_len,
            frames_per_block=self.frames_per_block,
            **more,
        )

    def new_cache(
        self,
        policy: CachePolicy,
        seeds: Tensor,
        *,
        spec: CacheSpec,
        targets: Tensor | None = None,
    ) -> KVCache:
        """An empty cache for a batch of videos.

        Raises:
            ValueError: If the budget is too small or the policy needs a head that is not there.
        """
        return make_cache(
            self.network,
            spec=spec,
            policy=policy,
            seeds=seeds,
            head=self.head,
            targets=targets,
        )


def in_precision(network: VideoTransformer, precision: str) -> VelocityModel:
    """A network for sampling that computes as in training at this precision.

    In `bf16` that is autocast, under which a cache, too, holds bfloat16. What autocast would
    convert in every pass, the weights of matrix products, is converted once, in `network` itself:
    the same numbers from half the memory.

    Raises:
        ValueError: If there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
    if precision == "fp32":
        return network
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            module.to(torch.bfloat16)

    def velocity(latents: Tensor, *given: Any, **more: Any) -> Tensor:
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, cache_enabled=False):
            return network(latents, *given, **more)

    return velocity


def transformer_from_config(model: dict[str, Any]) -> VideoTransformer:
    """A transformer of the sizes in a manifest or resolved config, with fresh weights."""
    sizes = {key: value for key, value in model.items() if key != "frames_per_block"}
    return VideoTransformer(**sizes | {"patch_size": tuple(model["patch_size"])})


def outline(model: dict[str, Any]) -> VideoTransformer:
    """A transformer on the meta device, for its names and shapes.

    The same one is returned for the same sizes, so it must not be changed.
    """
    return _outline(json.dumps(model, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _outline(model: str) -> VideoTransformer:
    with torch.device("meta"):
        return transformer_from_config(json.loads(model))


def head_from_config(config: dict[str, Any]) -> SalienceHead:
    """The salience head of an export's `config` section, with fresh weights."""
    model = config["model"]
    return SalienceHead(
        num_layers=model["num_layers"],
        width=model["num_heads"] * model["head_dim"],
        hidden=config["head"]["hidden"],
        grid=(config["grid"][0], config["grid"][1]),
        log=config["head_log"],
        block_len=config["head_block_len"],
    )


def load_student(path: Path, device: torch.device | str = "cpu") -> Student:
    """Rebuild the student of a stage folder or export, its network on the CPU.

    Args:
        path: Of the stage folder or export.
        device: See `Student`.

    Raises:
        UserError: If there is none, it is damaged, it is no student, or it was imported without
            what sampling needs.
    """
    export = load_export(path, role="student")
    config = export.manifest["config"]
    if "codec" not in config:
        raise UserError(
            f"{str(export.folder)!r} must name codec, text, size and fps to make videos, found "
            "none, for it was imported without a config; import it again with --config FILE"
        )
    network = transformer_from_config(config["model"])
    load_weights(network, export, stem="transformer")
    head = None
    if "head" in export.weights:
        head = head_from_config(config)
        load_weights(head, export, stem="head")
        head.eval()
    sampler = export.sampler
    assert sampler is not None, "every stage that exports a student names its sampler"
    return Student(
        export=export,
        network=network.eval(),
        head=head,
        sampler=Sampler(*sampler),
        codec_config=parse_section(CodecConfig, config["codec"], key="codec"),
        text_config=parse_section(TextConfig, config["text"], key="text"),
        device=device,
        grid=(config["grid"][0], config["grid"][1]),
        frames_per_block=config["model"]["frames_per_block"],
        size=(config["size"][0], config["size"][1]),
        fps=config["fps"],
        every=config["every"],
        precision=config.get("precision"),
    )
