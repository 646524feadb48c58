"""Small random checkpoints in the forms of other programs."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.transformer import VideoTransformer
from models.wan_config import Geometry, native_config

SMALL = Geometry(
    num_layers=2,
    num_heads=1,
    head_dim=128,
    ffn_dim=48,
    freq_dim=16,
    text_dim=8,
    in_channels=4,
    out_channels=5,
)
WRAPPED = "model._fsdp_wrapped_module."


def random_weights(geometry: Geometry = SMALL, *, seed: int = 0, dtype=torch.bfloat16):
    """Native name to a random tensor."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in VideoTransformer(**asdict(geometry)).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty(shape, dtype=dtype).normal_(generator=generator)
        for name, shape in shapes.items()
    }


def write_native(folder: Path, weights, *, shards: int = 1, geometry: Geometry = SMALL) -> Path:
    """A folder as Wan2.1's, with neighbours that are none of the transformer's."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(native_config(geometry)))
    (folder / "README.md").write_text("# a model card")
    torch.save({"encoder.weight": torch.ones(2)}, folder / "Wan2.1_VAE.pth")
    stem, names = "diffusion_pytorch_model", sorted(weights)
    if shards == 1:
        save_file(weights, folder / f"{stem}.safetensors")
        return folder
    places = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = names[shard::shards]
        save_file({name: weights[name] for name in own}, folder / file)
        places |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_self_forcing(path: Path, *, raw=None, ema=None, **more) -> Path:
    """A .pt whose trained weights have the names of a module, and their average those of FSDP."""
    content = dict(more)
    if raw is not None:
        content["generator"] = {f"model.{name}": tensor for name, tensor in raw.items()}
    if ema is not None:
        content["generator_ema"] = {WRAPPED + name: tensor for name, tensor in ema.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path
