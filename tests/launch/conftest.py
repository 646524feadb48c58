import shutil
from pathlib import Path

import pytest

from launch.__main__ import main

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")
CLIPS = ["source.world.clips=8", "trainer.accelerator=cpu"]


@pytest.fixture(scope="session")
def encoded(tmp_path_factory) -> Path:
    """A `runs_dir` with the data of the run `tiny`, of eight clips; read only."""
    root = tmp_path_factory.mktemp("encoded")
    for verb in ("world", "ingest", "encode"):
        assert main([verb, TINY, *CLIPS, f"runs_dir={root}"]) == 0
    return root


@pytest.fixture
def tiny(encoded, tmp_path) -> list[str]:
    """File and overrides of the run `tiny`, whose data is there, in a folder of its own."""
    shutil.copytree(encoded, tmp_path / "runs")
    return [TINY, *CLIPS, f"runs_dir={tmp_path / 'runs'}"]
