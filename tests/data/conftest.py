import pytest

from configs.schema import CodecConfig, TextConfig, WorldConfig
from data.ingest import encode, ingest
from data.world import write_world

WORLD = WorldConfig(clips=13, frames=23, identities=5, period=10)
FRAMES = 21


def encode_world(raw, out, **changes):
    settings = {
        "codec": CodecConfig(),
        "text": TextConfig(),
        "size": (32, 64),
        "frames": FRAMES,
        "samples_per_shard": 3,
        "progress": False,
    }
    encode(raw, out, **(settings | changes))


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """A folder with world/, raw/ and latents/ of 13 clips; read only."""
    root = tmp_path_factory.mktemp("sets")
    write_world(WORLD, root / "world", progress=False)
    ingest(root / "world", root / "raw", samples_per_shard=3, progress=False)
    encode_world(root / "raw", root / "latents")
    return root
