"""Memory of an import at the shape of Wan2.1 1.3B, measured in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from data.files import file_sha256
from tests.launch.checkpoints import random_weights, write_native
from tests.models.small import WAN_1_3B

MAKE = """
import sys
from dataclasses import asdict, replace
from pathlib import Path
import torch
from models.transformer import VideoTransformer
from tests.launch.checkpoints import write_native, write_self_forcing
from tests.models.small import WAN_1_3B
form, path, layers = sys.argv[1:]
geometry = replace(WAN_1_3B, num_layers=int(layers))
with torch.device("meta"):
    state = VideoTransformer(**asdict(geometry)).state_dict()
torch.manual_seed(0)
weights = {}
for name, tensor in state.items():  # repeats of random rows, for random numbers take long
    row = torch.randn(1, min(tensor.numel(), 2**20)).bfloat16()
    weights[name] = row.repeat(-(-tensor.numel() // row.numel()), 1).flatten()
    weights[name] = weights[name][: tensor.numel()].view(tensor.shape).clone()
if form == "native":
    write_native(Path(path), weights, geometry=geometry)
else:
    write_self_forcing(Path(path) / "model.pt", ema=weights)
if form == "longlive":
    layers = [name for name in weights if name.endswith(".weight") and ".norm" not in name]
    layers = [name.removesuffix(".weight") for name in layers if name.startswith("blocks.")]
    factors = {}
    for layer in layers:
        outputs, inputs = weights[f"{layer}.weight"].shape
        factors[f"base_model.model.{layer}.lora_A.weight"] = torch.ones(2, inputs)
        factors[f"base_model.model.{layer}.lora_B.weight"] = torch.ones(outputs, 2)
    torch.save({"generator_lora": factors}, Path(path) / "lora.pt")
"""
IMPORT = """
import sys
from launch.__main__ import main
small, src, dst, *flags = sys.argv[1:]
assert main(["import", small, dst + "-small", "--role", "teacher"]) == 0  # loads all libraries
before = memory("VmRSS")
assert main(["import", src, dst, *flags]) == 0
"""
LOAD = """
import sys
from pathlib import Path
from launch.export import load_export
before = memory("VmRSS")
load_export(Path(sys.argv[1])).tensors("transformer")
"""
MEMORY = """
def memory(key):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(status[key].split()[0])
"""
PEAK = """
sys.stdout.write(f"\\n{before} {memory('VmHWM')}")
"""


def memory_of(program: str, *words: object) -> tuple[int, int]:
    """Resident bytes, mapped files included, of a process before it works and at its peak."""
    command = [sys.executable, "-c", MEMORY + program + PEAK, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=800)
    before, peak = done.stdout.split()[-2:]
    return int(before), int(peak)


def make(form: str, folder: Path, num_layers: int) -> None:
    command = [sys.executable, "-c", MAKE, form, str(folder), str(num_layers)]
    subprocess.run(command, check=True, timeout=800)


def remove(folder: Path) -> None:
    """Free the disk at once: pytest keeps the folders of its last runs."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on a quiet machine: 2.8 GB are written twice and hashed twice
def test_an_import_at_the_shape_of_1_3b_takes_the_checkpoint_and_a_fifth(tmp_path):
    small = write_native(tmp_path / "small", random_weights())
    source, out = tmp_path / "m", tmp_path / "in"
    make("self-forcing", source, WAN_1_3B.num_layers)
    size = (source / "model.pt").stat().st_size
    assert size == pytest.approx(2 * 1_418_996_800, rel=1e-3)
    _, peak = memory_of(IMPORT, small, source, out)
    remove(source)
    remove(out)
    assert peak <= 1.2 * size


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_neither_an_import_nor_a_load_holds_a_second_copy(tmp_path):
    small = write_native(tmp_path / "small", random_weights())
    source, out = tmp_path / "wan", tmp_path / "in"
    make("native", source, 4)
    size = sum(path.stat().st_size for path in source.iterdir())
    before, peak = memory_of(IMPORT, small, source, out, "--role", "teacher")
    idle, loaded = memory_of(LOAD, out)
    remove(source)
    remove(out)
    assert 0.9 * size < peak - before <= 1.1 * size
    assert loaded - idle <= 0.1 * size, "what nobody looks at must not be read"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lora_is_merged_in_the_one_copy_that_is_held(tmp_path):
    small = write_native(tmp_path / "small", random_weights())
    source, out = tmp_path / "long", tmp_path / "in"
    make("longlive", source, 4)
    base = source / "model.pt"
    size, written = base.stat().st_size, file_sha256(base)
    lora = ["--lora", source / "lora.pt", "--lora-alpha", 2]
    before, peak = memory_of(IMPORT, small, base, out, *lora)
    assert file_sha256(base) == written, "the file that is merged into stays as it is"
    remove(source)
    remove(out)
    # Beside the one copy: some float32 buffers of 55 MB, as large as a layer. Two copies are 2.1.
    assert 0.9 * size < peak - before <= 1.75 * size
