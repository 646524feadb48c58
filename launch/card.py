"""The model card of an export: what it is, how it was trained and checked, how to load it."""

from collections.abc import Mapping
from typing import Any

from launch.adapters import ADAPTER_LAYOUTS
from launch.formats import EMA, GENERATORS, RAW
from models.wan_config import beyond_wan

_LOADING = {
    "diffusers": """```python
import torch
from diffusers import WanTransformer3DModel

transformer = WanTransformer3DModel.from_pretrained(
    "THIS_FOLDER", subfolder="transformer", torch_dtype=torch.bfloat16
)
```

Give it to `WanPipeline.from_pretrained(WAN_FOLDER, transformer=transformer)` of a Wan2.1 of the
same size.""",
    "safetensors": """```python
from safetensors.torch import load_file

weights = load_file("THIS_FOLDER/diffusion_pytorch_model.safetensors")  # Wan2.1's own names
```

The folder stands in for the transformer of a native Wan2.1 folder. The names in the `.safetensors`
file are those that ComfyUI reads in a diffusion model (not tried).""",
    "self-forcing": """```python
import torch

weights = torch.load("THIS_FOLDER/model.pt", weights_only=True, mmap=True)["{key}"]
```

Self-Forcing's `inference.py` takes the file as `--checkpoint_path`{flag}.""",
    "diffusers-lora": """```python
import torch
from diffusers import WanPipeline

# STUDENT_FOLDER: with the student that it started from as the transformer
pipeline = WanPipeline.from_pretrained("STUDENT_FOLDER", torch_dtype=torch.bfloat16)
pipeline.load_lora_weights("THIS_FOLDER", weight_name="pytorch_lora_weights.safetensors")
```""",
    "longlive-lora": """`lora.pt` holds `generator_lora`, and `critic_lora` if the critic was
adapted, too, with the names that peft gives to a wrapped network. They were derived from peft:
whether LongLive's own code takes the file has not been tried. Its config must name this rank, and
an alpha of the same size.""",
}
_WITH_WANS_CODE = ("safetensors", "self-forcing")
"""Forms whose readers build the network by Wan's own class."""
_KINDS = {EMA: "the moving average of the weights", RAW: "the weights, not averaged"}


def model_card(manifest: Mapping[str, Any]) -> str:
    """Markdown of the card.

    Args:
        manifest: As in `pafukv.json`.
    """
    parts = [
        _header(manifest),
        f"# {manifest['stage']}, a Wan2.1 {manifest['role']}",
        _what(manifest),
        "## Training",
        _training(manifest),
        f"## Format: {manifest['format']}",
        _loading(manifest),
        "## Salience head and cache policy",
        _head(manifest),
        "## What was verified",
        _verified(manifest),
        "## Licence",
        "Not stated here. The licence of the weights that training started from, and of the data, "
        "applies; whoever passes this on must state it.",
    ]
    return "\n\n".join(parts) + "\n"


def _header(manifest: Mapping[str, Any]) -> str:
    library = "\nlibrary_name: diffusers" if manifest["format"] == "diffusers" else ""
    return f"---\npipeline_tag: text-to-video{library}\ntags: [wan2.1, pafukv]\n---"


def _what(manifest: Mapping[str, Any]) -> str:
    model = manifest["config"]["model"]
    kind = "A bidirectional text-to-video transformer: it sees all frames at once."
    if manifest["role"] == "student":
        kind = (
            f"A block-causal text-to-video transformer: it generates {model['frames_per_block']} "
            "latent frames at a time and reads the earlier ones from a KV cache."
        )
    if manifest["format"] in ADAPTER_LAYOUTS:
        return f"{kind} {_adapter(manifest)}"
    text = (
        f"{kind} Wan2.1's architecture, {model['num_layers']} layers, {model['num_heads']} heads "
        f"of {model['head_dim']}, {manifest['parameters']:,} parameters "
        f"({', '.join(manifest['dtypes'])})."
    )
    sampler = manifest.get("sampler")
    if sampler is None:
        return text
    sigmas = ", ".join(f"{sigma:.4g}" for sigma in sampler["sigmas"])
    how = "new noise at each" if sampler["renoise"] else "Euler steps along the velocity"
    return f"{text} Sampler: noise levels {sigmas}; {how}."


def _adapter(manifest: Mapping[str, Any]) -> str:
    return (
        f"This is not the network but a LoRA adapter for it, of rank {manifest['lora']['rank']}, "
        f"{manifest['parameters']:,} parameters ({', '.join(manifest['dtypes'])}): what training "
        "has added to the student that it started from, whose hash stands below, and fits on no "
        "other. The second factors are scaled, so that alpha is the rank."
    )


def _training(manifest: Mapping[str, Any]) -> str:
    source = manifest["source"]
    origin = f"the export {source['hash'][:12]} of this stage"
    if source["kind"] == "checkpoint":
        origin = f"its checkpoint {source['name']}, written by {source['ranks']} rank(s)"
    sets = " and ".join(_KINDS[kind] for kind in manifest["sets"])
    if manifest["weights"] is None:
        sets = "weights of which is not known whether they are averaged"
    lines = [
        f"- stage `{manifest['stage']}` of kind `{manifest.get('kind', 'unknown')}`, "
        f"{manifest.get('steps', 'unknown')} steps; taken from {origin}",
        f"- holds {sets}",
    ]
    lines += [f"- {role} at the start: {digest[:12]}" for role, digest in _parents(manifest)]
    used = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return "\n".join([*lines, f"- exported with {used}", "- all settings: `pafukv.json`"])


def _parents(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(role, str(digest)) for role, digest in manifest["parents"].items()]


def _loading(manifest: Mapping[str, Any]) -> str:
    text = _LOADING[manifest["format"]]
    if manifest["format"] == "self-forcing":
        kind = manifest["sets"][0]
        key, flag = GENERATORS[kind], ", with `--use_ema`" if kind == EMA else ""
        text = text.replace("{key}", key).replace("{flag}", flag)
    misfit = not_for_wan(manifest)
    if misfit is not None:
        text = f"{text}\n\n**{misfit}**"
    if manifest["format"] in ADAPTER_LAYOUTS:
        return (
            f"{text}\n\nWhole networks come from `python -m launch export` with another format. "
            "Diffusers' network is bidirectional: it knows no blocks and no KV cache."
        )
    back = f"python -m launch import THIS_FOLDER NEW_FOLDER --role {manifest['role']}"
    if manifest["role"] == "teacher":
        return f"{text}\n\nBack into pafukv: `{back}`."
    return (
        f"{text}\n\nBack into pafukv, which generates block by block under a cache policy: "
        f"`{back}`, then `python -m launch sample NEW_FOLDER`. Diffusers' and ComfyUI's networks "
        "are bidirectional: they know no blocks and no KV cache."
    )


def not_for_wan(manifest: Mapping[str, Any]) -> str | None:
    """Why Wan's own code cannot load an export that has Wan's names; None if it can.

    Args:
        manifest: As in `pafukv.json`.
    """
    sizes = beyond_wan(manifest["config"]["model"])
    if not sizes or manifest["format"] not in _WITH_WANS_CODE:
        return None
    listed = " and ".join(f"{key} {value}" for key, value in sizes.items())
    return (
        f"The code of Wan2.1 and its descendants cannot load this: it fixes text_dim and "
        f"patch_size, where these weights have {listed}. Diffusers (--format diffusers) and "
        "pafukv can."
    )


def _head(manifest: Mapping[str, Any]) -> str:
    policy = manifest["policy"]
    if not manifest["has_head"]:
        return "There is no salience head." + (
            f" The student was trained under the policy `{policy['name']}`." if policy else ""
        )
    settings = {key: value for key, value in policy.items() if key not in ("name", "params")}
    rows = "\n".join(f"| {key} | {value} |" for key, value in (policy["params"] | settings).items())
    trained = "as trained" if settings else "the defaults: no stage was trained under a policy"
    return (
        "`salience_head.safetensors` is the S-MLP, which predicts how strongly a token will be "
        "read (`later`, `within`, `earlier`), with the statistics that its targets were "
        f"standardised by. Policy `{policy['name']}`, {trained}:\n\n"
        f"| setting | value |\n| --- | --- |\n{rows}"
    )


def _verified(manifest: Mapping[str, Any]) -> str:
    found = manifest["verified"]
    if found is None:
        return "Nothing: exported without `--verify`."
    count = " + ".join(str(number) for number in found["tensors"].values())
    videos = ", ".join(" x ".join(map(str, size)) for size in found["videos"])
    lines = [
        f"- Weights: {count} tensors came back bit by bit, with the right names, shapes and "
        f"dtypes. In {found['reader']} and in pafukv's own network, in float32, velocity and the "
        f"state behind the last layer differ by at most {found['largest_difference']:.1e} of the "
        f"largest value (tolerance {found['tolerance']:g}) on seeded videos of {videos} "
        "(frames x token rows x token columns)."
    ]
    if manifest["role"] == "student":
        lines.append(
            "- Diffusers' network is bidirectional, so this causal student was compared in "
            "one-block mode: all frames in one block. Generation in several blocks through a "
            "cache is verified by pafukv's own tests only."
        )
    if manifest["has_head"]:
        lines.append(
            "- `salience_head.safetensors`: came back bit by bit; no other program reads it."
        )
    return "\n".join(lines)
