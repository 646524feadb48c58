"""Networks of diffusers and transformers, from folders of this machine and from nowhere else."""

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from configs.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETTINGS = "config.json"
WEIGHTS = "*.safetensors"
NUM_SAMPLES, SAMPLE_BYTES = 64, 1 << 16
"""Of a file that is known by samples; smaller ones than all of these are read whole."""


class PretrainedError(UserError):
    """A folder does not hold the network that the config promises; the message names the key."""


def require_packages(key: str, names: Sequence[str]) -> None:
    """Raise `PretrainedError` if one of the packages that a value of `key` needs is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise PretrainedError(
            f"{key} needs the Python packages {list(names)}, found no {missing[0]}; install them "
            "with `pip install -e '.[wan]' -c constraints.txt`"
        )


def find_network(key: str, path: str, inside: str, *, marks: Sequence[str]) -> Path:
    """The folder of a network, which may be the one given or `inside` it.

    Args:
        key: The config key that gave `path`.
        path: Of the network's folder, or of the diffusers folder around it.
        inside: Name of the network's folder in such a folder.
        marks: Its config.json must hold one of these as `_class_name` or `model_type`.

    Raises:
        PretrainedError: If there is no such folder, it is of another network, or it has no
            safetensors.
    """
    root = Path(path)
    folder = next((f for f in (root / inside, root) if (f / SETTINGS).is_file()), None)
    if not path or folder is None:
        raise PretrainedError(
            f"{key} must be a folder with {SETTINGS}, or with such a folder {inside!r} in it, "
            f"found {path!r}, which is none; give a folder in the layout of diffusers"
        )
    settings = read_settings(folder)
    found = [settings.get(name) for name in ("_class_name", "model_type")]
    if not set(found) & set(marks):
        raise PretrainedError(
            f"{folder / SETTINGS} must describe a network of class or type {' or '.join(marks)}, "
            f"found {[mark for mark in found if mark] or 'neither'}; correct {key}"
        )
    if not list(folder.glob(WEIGHTS)):
        raise PretrainedError(
            f"{folder} must hold weights as {WEIGHTS}, found none; correct {key}, or convert the "
            "weights: pickle files are not read"
        )
    return folder


def read_settings(folder: Path) -> dict[str, Any]:
    """The config.json of a network.

    Raises:
        PretrainedError: If it is no JSON object.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
    except ValueError as error:
        raise PretrainedError(
            f"{folder / SETTINGS} must be JSON, found {error}; copy the folder again"
        ) from error
    if not isinstance(settings, dict):
        raise PretrainedError(
            f"{folder / SETTINGS} must be a JSON object, found {type(settings).__name__}; copy the "
            "folder again"
        )
    return settings


def fingerprint(folder: Path, patterns: Sequence[str] = (SETTINGS, WEIGHTS)) -> list[Any]:
    """Name, size and samples of files of a folder: what is made with them follows from these.

    Of files above 4 MiB, 64 pieces spread over all of it are looked at, so that a plan with
    gigabytes of weights is known at once; other weights differ nearly everywhere. A copy counts as
    the same, whatever its date.
    """
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return [[file.name, file.stat().st_size, _sampled_sha256(file)] for file in files]


def _sampled_sha256(path: Path) -> str:
    last = max(0, path.stat().st_size - SAMPLE_BYTES)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(NUM_SAMPLES):
            file.seek(last * number // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def load_network(
    cls: Any,
    folder: Path,
    *,
    key: str,
    device: torch.device | str,
    ignored: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """Load a network whole, frozen and in evaluation mode.

    Args:
        cls: With `from_pretrained`, of diffusers or transformers.
        folder: From `find_network`.
        key: The config key that names the folder.
        device: Where it shall compute.
        ignored: How names of weights begin that a larger network around this one may bring.
        **options: For `from_pretrained`, such as the data type.

    Raises:
        PretrainedError: If a weight is missing, left over, misshaped or damaged, or the device is
            not there.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise PretrainedError(
            f"the network of {key} shall compute on a CUDA device, found none; set "
            "trainer.accelerator=cpu"
        )
    try:
        network, report = cls.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise PretrainedError(
            f"{folder} must hold the whole weights of {cls.__name__}, loading them found: "
            f"{' '.join(str(error).split())[:300]}; copy the folder again, or correct {key}"
        ) from error
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(str(entry) for entry in report[name])
        if wrong := [entry for entry in wrong if not entry.startswith(ignored)]:
            raise PretrainedError(
                f"{folder} must hold exactly the weights of {cls.__name__}, found {len(wrong)} "
                f"{name.replace('_', ' ')}: {', '.join(wrong[:5])}; correct {key}"
            )
    return network.requires_grad_(False).eval().to(device)


def require_sizes(key: str, folder: Path, **sizes: tuple[int, int]) -> None:
    """Raise `PretrainedError` unless the config says of a network what the network is.

    Args:
        key: Of the config section, such as `codec`.
        folder: Of the network.
        **sizes: What the section says, and what the network has.
    """
    wrong = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    if wrong:
        said = ", ".join(f"{key}.{name}={pair[0]}" for name, pair in wrong.items())
        due = " ".join(f"{key}.{name}={pair[1]}" for name, pair in wrong.items())
        raise PretrainedError(
            f"section {key} must say what the network in {folder} is, found {said}; set {due}"
        )
