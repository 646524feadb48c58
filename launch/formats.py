"""Wan2.1 checkpoints as other programs write them, told apart by what is in them.

    native         folder: config.json and safetensors, whole or in shards; or one such file
    diffusers      folder of a pipeline or of its transformer; or one file with diffusers' names
    self-forcing   .pt of Self-Forcing, CausVid, Causal-Forcing: {generator, generator_ema, ...}
    torch          .pt of a state dict, bare or as {model: ...}

Tensors are mapped into memory: what is not looked at is not read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.load import nearest
from launch.weight_files import (
    INDEX,
    PICKLE,
    SAFETENSORS,
    TORCH,
    WeightsError,
    files_by_kind,
    kind_of,
    read_index,
    read_json,
    read_safetensors,
    read_shards,
    read_torch,
)
from models.wan_config import (
    Geometry,
    is_diffusers_config,
    read_diffusers_config,
    read_native_config,
)
from models.wan_names import bare_name, names_of_diffusers, native_name

RAW, EMA = "raw", "ema"
GENERATORS = {RAW: "generator", EMA: "generator_ema"}
"""Where Self-Forcing keeps the weights that are trained, and their moving average."""
LORA = "generator_lora"
SECOND = "transformer_2"
"""Where a pipeline of diffusers keeps the expert for low noise, if it has two."""
LISTED = 10


@dataclass(frozen=True)
class Checkpoint:
    """The transformer of a source.

    Attributes:
        form: As in the list above.
        files: That were read.
        tensors: By native name.
        unknown: Names in the source that no text-to-video transformer has.
        config: What its config.json says, if it has one.
        role: `student` where the form says so.
        chosen: `RAW` or `EMA`, where the form tells them apart.
        unused: What else a .pt holds.
    """

    form: str
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    unknown: tuple[str, ...] = ()
    config: Geometry | None = None
    role: str | None = None
    chosen: str | None = None
    unused: tuple[str, ...] = ()


def read_checkpoint(path: Path, *, weights: str | None = None) -> Checkpoint:
    """Find out what a file or folder holds, and map its transformer.

    Args:
        path: One of the forms above.
        weights: `RAW` or `EMA`, for a form that tells them apart; None = `EMA` if it is there.

    Raises:
        WeightsError: If there is no transformer, or more than one, or a file is damaged.
    """
    if not path.exists():
        beside = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = nearest(str(path), beside) or "; check the path"
        raise WeightsError(f"{str(path)!r} must exist, found no such file or folder{hint}")
    found = _of_folder(path, weights) if path.is_dir() else _of_file(path, weights, None)
    if weights is not None and found.chosen is None:
        raise WeightsError(
            f"--weights {weights} is for files with {' and '.join(GENERATORS.values())}, found "
            f"{found.form} weights in {str(path)!r}, which hold one set; leave it out"
        )
    return found


def unwrapped(named: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Values under their bare names.

    Raises:
        WeightsError: If two names are the same without their wrappers.
    """
    bare: dict[str, Any] = {}
    for name, value in named.items():
        short = bare_name(name)
        if short in bare:
            raise WeightsError(
                f"{where!r} must hold one network, found several tensors for {short!r}, one of "
                f"them as {name!r}; save one of the networks alone"
            )
        bare[short] = value
    return bare


def _of_folder(path: Path, weights: str | None) -> Checkpoint:
    """The one transformer in a folder, or in `transformer/` below it."""
    _require_one_expert(path)
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    found = files_by_kind(folder)
    configs = [file for file in found[None] if file.name == "config.json"]
    config = _read_config(configs[0]) if configs else None
    parts = [file for file in found[SAFETENSORS] if _holds_transformer(file)]
    for files in (found[INDEX], parts, found[TORCH], found[PICKLE]):
        if len(files) > 1:
            raise WeightsError(
                f"{str(folder)!r} must hold one transformer, found {len(files)} candidates: "
                f"{_names(files)}; give one of them, or the index of the shards if they are some"
            )
        if files:
            return _of_file(files[0], weights, config)
    raise WeightsError(
        f"{str(folder)!r} must hold the weights of a Wan2.1 transformer (safetensors, or a .pt), "
        f"found {_names(list(folder.iterdir())) or 'nothing'}; give the folder or file that does"
    )


def _require_one_expert(path: Path) -> None:
    """Raise `WeightsError` for a pipeline of diffusers with a second transformer, or its name."""
    index = path / "model_index.json"
    named = read_json(index).get(SECOND) if index.is_file() else None
    is_named = isinstance(named, list) and any(named)  # [null, null] where there is none
    if is_named or (path / SECOND).exists():
        raise WeightsError(
            f"{str(path)!r} must be a pipeline with one transformer, as those of Wan2.1, found "
            f"{SECOND!r}, too, as in Wan2.2 A14B, whose two experts share the noise levels; take a "
            "model with one transformer"
        )


def _of_file(path: Path, weights: str | None, config: Geometry | None) -> Checkpoint:
    if path.name.endswith(INDEX):
        shards = sorted(set(read_index(path).values()))
        return _safetensors((path, *(path.parent / name for name in shards)), config)
    kind = kind_of(path)
    if kind == SAFETENSORS:
        return _safetensors((path,), config)
    if kind is None:
        raise WeightsError(
            f"{str(path)!r} must be a safetensors file or one of torch.save, found neither; give "
            "the file or folder that holds the transformer"
        )
    return _of_torch(path, weights, config)


def _safetensors(files: Sequence[Path], config: Geometry | None) -> Checkpoint:
    named = read_safetensors(files[0]) if len(files) == 1 else read_shards(files[0])
    tensors, unknown, is_diffusers = _native(named, str(files[0]))
    form = "diffusers" if is_diffusers else "native"
    return Checkpoint(form, tuple(files), tensors, unknown, config)


def _of_torch(path: Path, weights: str | None, config: Geometry | None) -> Checkpoint:
    content = read_torch(path)
    if LORA in content:
        raise WeightsError(
            f"{str(path)!r} must hold a whole network, found a LoRA ({LORA}); give the checkpoint "
            "that it was trained on as SRC, and this file with --lora"
        )
    sets = {kind: content[key] for kind, key in GENERATORS.items() if key in content}
    if not sets:
        inner = content.get("model")
        named = inner if isinstance(inner, dict) else content
        tensors, unknown, _ = _native(named, str(path))
        unused = tuple(str(key) for key in content if key != "model" and named is inner)
        return Checkpoint("torch", (path,), tensors, unknown, config, unused=unused)
    chosen = weights or (EMA if EMA in sets else RAW)
    if chosen not in sets:
        raise WeightsError(
            f"--weights {chosen} needs {GENERATORS[chosen]!r} in {str(path)!r}, found only "
            f"{sorted(map(str, content))}; leave it out"
        )
    named = sets[chosen]
    if not isinstance(named, dict):
        raise WeightsError(
            f"{GENERATORS[chosen]!r} in {str(path)!r} must be a state dict, found a "
            f"{type(named).__name__}; save the state dict of the network"
        )
    tensors, unknown, _ = _native(named, str(path))
    unused = tuple(str(key) for key in content if key != GENERATORS[chosen])
    return Checkpoint("self-forcing", (path,), tensors, unknown, config, "student", chosen, unused)


def _native(
    named: Mapping[str, Any], where: str
) -> tuple[dict[str, Tensor], tuple[str, ...], bool]:
    """Tensors by native name, names that mean nothing, and whether the names were diffusers'."""
    bare = unwrapped({str(name): value for name, value in named.items()}, where=where)
    is_diffusers = worded(where, lambda: names_of_diffusers(bare))
    tensors, unknown = {}, []
    for name, value in bare.items():
        native = _or_none(native_name, name) if is_diffusers else name
        if native is None or not isinstance(value, Tensor) or value.is_nested:
            unknown.append(name)
        else:
            tensors[native] = value
    return tensors, tuple(unknown), is_diffusers


def _holds_transformer(path: Path) -> bool:
    """Whether some of the tensors in a safetensors file are those of a transformer's blocks."""
    names = [bare_name(name) for name in read_safetensors(path)]
    return any(name.startswith("blocks.") and ".lora_" not in name for name in names)


def _read_config(path: Path) -> Geometry:
    config = read_json(path)
    read = read_diffusers_config if is_diffusers_config(config) else read_native_config
    return worded(str(path), lambda: read(config))


def worded(where: str, ask: Callable[[], Any]) -> Any:
    """What `ask` answers; its `ValueError` becomes one that names the file."""
    try:
        return ask()
    except ValueError as error:
        raise WeightsError(f"{where!r}: {error}") from error


def _or_none(translate: Callable[[str], str], name: str) -> str | None:
    try:
        return translate(name)
    except ValueError:
        return None


def _names(files: Sequence[Path]) -> str:
    names = sorted(file.name for file in files)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
