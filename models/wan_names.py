"""Names of the tensors of a Wan2.1 text-to-video transformer: native, in diffusers, in wrappers.

The native names are those of `models.transformer.VideoTransformer`. Diffusers numbers the norms of
a block by their order, Wan by their role, so the one with weights is `norm3` there and `norm2`
here; the other two have none. Shapes are the same under both names.
"""

import re
from collections.abc import Iterable

_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_ATTENTION = _PROJECTIONS | {"norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
}
_BLOCK_OF_DIFFUSERS = {theirs: ours for ours, theirs in _BLOCK.items()}
_TOP_OF_DIFFUSERS = {theirs: ours for ours, theirs in _TOP.items()}

_ANYWHERE = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
"""What FSDP, activation checkpointing and torch.compile put between the parts of a name."""
_IN_FRONT = {"module", "model", "generator", "transformer", "diffusion_model"}
"""What the classes around a network put before a name."""

_OTHER_MODELS = {
    "an image-to-video model": (
        *("k_img", "v_img", "norm_k_img", "img_emb"),
        *("add_k_proj", "add_v_proj", "norm_added_k", "image_embedder"),
    ),
    "a VACE model": ("vace_blocks", "vace_patch_embedding"),
    "an audio-driven model": ("audio_encoder", "casual_audio_encoder", "audio_injector"),
}
"""Kinds of Wan checkpoints that cannot be used here, and parts of names that only they have."""


def native_names(num_layers: int) -> list[str]:
    """Native names of all tensors of a network: 27 for every layer, and 15."""
    paths = [*_TOP, *(f"blocks.{layer}.{path}" for layer in range(num_layers) for path in _BLOCK)]
    return [name for path in paths for name in _tensors(path)]


def diffusers_name(name: str) -> str:
    """Name in diffusers of a native tensor, or of a native module such as `blocks.0.ffn.2`.

    Raises:
        ValueError: If a text-to-video network has nothing of this name.
    """
    return _translate(name, _TOP, _BLOCK)


def native_name(name: str) -> str:
    """Native name of a tensor or module of diffusers' `WanTransformer3DModel`.

    Raises:
        ValueError: If a text-to-video network has nothing of this name.
    """
    return _translate(name, _TOP_OF_DIFFUSERS, _BLOCK_OF_DIFFUSERS)


def bare_name(name: str) -> str:
    """A name without what wrappers put around it, however deeply they are nested."""
    parts = [part for part in name.split(".") if part not in _ANYWHERE]
    while len(parts) > 1 and parts[0] in _IN_FRONT:
        parts = parts[1:]
    return ".".join(parts)


def names_of_diffusers(names: Iterable[str]) -> bool:
    """Whether bare names are those of diffusers, rather than native ones.

    Raises:
        ValueError: If they are neither, or belong to another kind of Wan model.
    """
    names = list(names)
    parts = {part for name in names for part in name.split(".")}
    for kind, own in _OTHER_MODELS.items():
        found = parts.intersection(own)
        if found:
            raise ValueError(
                f"weights must be those of a Wan2.1 text-to-video transformer, found names with "
                f"{min(found)!r}, which only {kind} has; take a text-to-video checkpoint"
            )
    is_native, is_diffusers = "self_attn" in parts, "attn1" in parts
    if is_native == is_diffusers:
        raise ValueError(
            "weights must be those of a Wan2.1 text-to-video transformer, with either 'self_attn' "
            f"(native) or 'attn1' (diffusers) in their names, found {len(names)} names such as "
            f"{sorted(names)[:3]}; take another file"
        )
    return is_diffusers


def _tensors(path: str) -> list[str]:
    """The tensors of a module; a path that is itself a tensor stays."""
    if path.endswith("modulation"):
        return [path]
    kinds = ("weight",) if path.endswith(("norm_q", "norm_k")) else ("weight", "bias")
    return [f"{path}.{kind}" for kind in kinds]


def _translate(name: str, top: dict[str, str], block: dict[str, str]) -> str:
    found = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
    if found is not None:
        before, path, after = (part or "" for part in found.groups())
        translated = (block if before else top).get(path)
        if translated is not None:
            return f"{before}{translated}{after}"
    raise ValueError(
        f"a Wan2.1 text-to-video transformer has no tensor or module {name!r}; take a checkpoint "
        "of that model, without other networks in the same file"
    )
