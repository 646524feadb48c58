import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from configs.errors import UserError
from data.order import OrderPlan
from data.shard_writer import ShardSetWriter
from data.shards import BadSample, BadShard, ShardSet

SAMPLES = 11


def sample(number):
    draw = np.random.default_rng(number)
    return f"s-{number:03d}", {"bin": draw.bytes(700 + number), "json": b"%d" % number}


def write_set(root, numbers=range(SAMPLES), source_hash="h", **settings):
    settings = {"samples_per_shard": 4} | settings
    with ShardSetWriter(root, source_hash=source_hash, **settings) as writer:
        for number in list(numbers)[writer.completed :]:
            key, members = sample(number)
            writer.write(key, members, caption=f"caption {number}", frames=number)
    return root


def files(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_what_is_written_is_read(tmp_path):
    shards = ShardSet(write_set(tmp_path, properties={"a": 1}))
    assert len(shards) == SAMPLES
    assert shards.sizes == [4, 4, 3]
    assert shards.properties == {"a": 1}
    shards.verify()
    for number in (10, 0, 4, 3, 7):
        key, members = sample(number)
        assert shards.read(number) == members
        entry = shards.entry(number)
        assert (entry.key, entry.caption, entry.frames) == (key, f"caption {number}", number)
    with pytest.raises(IndexError):
        shards.read(SAMPLES)


def test_stock_webdataset_reads_the_shards(tmp_path):
    write_set(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(found) == SAMPLES
    for number, row in enumerate(found):
        key, members = sample(number)
        assert row["__key__"] == key
        assert {name: row[name] for name in members} == members


def test_the_same_samples_give_the_same_bytes_and_hash(tmp_path):
    first, second = write_set(tmp_path / "a"), write_set(tmp_path / "b")
    assert files(first) == files(second)
    third = write_set(tmp_path / "c", numbers=[*range(SAMPLES - 1), 99])
    assert ShardSet(third).hash != ShardSet(first).hash


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.OPEN_SHARDS", 2)
    shards = ShardSet(write_set(tmp_path, samples_per_shard=1))
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for number in [*range(SAMPLES), *range(SAMPLES)]:
        assert shards.read(number) == sample(number)[1]
    assert len(list(Path("/proc/self/fd").iterdir())) <= opened + 2
    assert pickle.loads(pickle.dumps(shards)).read(5) == sample(5)[1]


def write_some(root, number):
    """Write the first `number` samples, then fail."""
    with (
        pytest.raises(BadSample, match="key"),
        ShardSetWriter(root, source_hash="h", samples_per_shard=4) as writer,
    ):
        write_then_fail(writer, number)


def write_then_fail(writer, number):
    for one in range(number):
        writer.write(*sample(one), caption=f"caption {one}", frames=one)
    writer.write("bad.key", {}, caption="", frames=0)


def test_an_interrupted_writer_leaves_no_set_and_goes_on(tmp_path):
    whole = write_set(tmp_path / "whole")
    write_some(tmp_path / "half", 6)
    assert not list((tmp_path / "half").glob("*.part-*"))
    with pytest.raises(BadShard, match="complete set"):
        ShardSet(tmp_path / "half")
    again = ShardSetWriter(tmp_path / "half", source_hash="h", samples_per_shard=4)
    assert again.completed == 4
    assert files(write_set(tmp_path / "half")) == files(whole)


def test_a_killed_writer_leaves_no_set_and_goes_on(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_shards as t
from data.shard_writer import ShardSetWriter
with ShardSetWriter(Path({str(tmp_path / "half")!r}), source_hash="h", samples_per_shard=4) as w:
    for number in range(10):
        key, members = t.sample(number)
        w.write(key, members, caption=f"caption {{number}}", frames=number)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=False)
    assert done.returncode == -9
    assert list((tmp_path / "half").glob(".*.part-*"))
    with pytest.raises(BadShard, match="complete set"):
        ShardSet(tmp_path / "half")
    assert ShardSetWriter(tmp_path / "half", source_hash="h", samples_per_shard=4).completed == 8
    assert files(write_set(tmp_path / "half")) == files(write_set(tmp_path / "whole"))


def test_a_sealed_shard_that_was_damaged_is_written_again(tmp_path):
    write_set(tmp_path / "whole")
    root = tmp_path / "half"
    write_some(root, 9)
    content = bytearray((root / "shard-000001.tar").read_bytes())
    content[600] ^= 1
    (root / "shard-000001.tar").write_bytes(content)
    assert ShardSetWriter(root, source_hash="h", samples_per_shard=4).completed == 4
    assert files(write_set(root)) == files(tmp_path / "whole")


def test_a_whole_set_is_left_alone_and_another_source_replaces_it(tmp_path):
    write_set(tmp_path)
    stamp = (tmp_path / "manifest.json").stat().st_mtime_ns
    writer = ShardSetWriter(tmp_path, source_hash="h", samples_per_shard=4)
    assert writer.is_complete
    with writer:
        pass
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == stamp
    write_set(tmp_path, numbers=[5], source_hash="other")
    assert len(ShardSet(tmp_path)) == 1
    assert set(files(tmp_path)) == {"manifest.json", "shard-000000.tar"}


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="must be empty"):
        write_set(tmp_path)
    assert files(tmp_path) == {"shard-000000.tar": b"mine"}


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "a b"])
def test_a_key_that_would_be_read_back_differently_is_refused(tmp_path, key):
    with (
        pytest.raises(BadSample, match="key"),
        ShardSetWriter(tmp_path, source_hash="h", samples_per_shard=4) as writer,
    ):
        writer.write(key, {"json": b""}, caption="", frames=1)
    assert not list(tmp_path.glob("*.tar"))


def test_a_key_twice_and_a_bad_extension_are_refused(tmp_path):
    with pytest.raises(BadSample, match="unique"):
        write_set(tmp_path / "a", numbers=[1, 1])
    with (
        pytest.raises(BadSample, match="extensions"),
        ShardSetWriter(tmp_path / "b", source_hash="h", samples_per_shard=4) as writer,
    ):
        writer.write("k", {"JPG": b""}, caption="", frames=1)


def test_damage_is_named_when_the_set_is_opened(tmp_path):
    write_set(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    with pytest.raises(BadShard, match=rf"shard-000001\.tar must have {len(content)} bytes"):
        ShardSet(tmp_path)
    shard.unlink()
    with pytest.raises(BadShard, match=r"shard-000001\.tar must exist"):
        ShardSet(tmp_path)


def test_a_turned_bit_is_named_when_its_sample_is_read(tmp_path):
    write_set(tmp_path)
    offset, size, _ = ShardSet(tmp_path).entry(6).members["bin"]
    shard = tmp_path / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[offset + size - 1] ^= 64
    shard.write_bytes(content)
    shards = ShardSet(tmp_path)
    assert shards.read(5) == sample(5)[1]
    with pytest.raises(BadSample, match=r"shard-000001\.tar::s-006\.bin"):
        shards.read(6)
    with pytest.raises(BadShard, match=r"shard-000001\.tar must have the sha256"):
        shards.verify()


def test_a_shard_cut_while_it_is_open_is_named(tmp_path):
    shards = ShardSet(write_set(tmp_path))
    shards.read(0)
    os.truncate(tmp_path / "shard-000000.tar", 600)
    with pytest.raises(BadSample, match=r"s-003\.bin must be 703 bytes"):
        shards.read(3)


@pytest.mark.parametrize("change", ["cut", "edited", "foreign"])
def test_a_damaged_manifest_is_refused(tmp_path, change):
    write_set(tmp_path)
    path = tmp_path / "manifest.json"
    text = path.read_text()
    edited = {
        "cut": text[: len(text) // 2],
        "edited": text.replace("s-006", "s-066"),
        "foreign": json.dumps({"shards": 3}),
    }
    path.write_text(edited[change])
    with pytest.raises(BadShard, match=r"manifest\.json"):
        ShardSet(tmp_path)


def test_an_epoch_holds_every_sample_once_and_epochs_differ():
    plan = OrderPlan([4, 1, 6, 3, 3], seed=1, window=2)
    epochs = [[plan.at(17 * epoch + place)[1] for place in range(17)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(17))
        assert plan.at(17 * number)[0] == number
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_a_function_of_sizes_and_seed():
    plan, again = OrderPlan([5, 5, 2], seed=3), OrderPlan([5, 5, 2], seed=3)
    backwards = [again.at(position) for position in reversed(range(60))][::-1]
    assert [plan.at(position) for position in range(60)] == backwards
    other = OrderPlan([5, 5, 2], seed=4)
    assert [other.at(position) for position in range(60)] != backwards
    assert plan.sample_seed(0, 1) == again.sample_seed(0, 1)
    seeds = {plan.sample_seed(epoch, index) for epoch in range(5) for index in range(12)}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_only_a_window_of_shards_is_read_at_a_time():
    plan = OrderPlan([10] * 8, seed=0, window=2)
    order = np.array([plan.at(position)[1] for position in range(80)]) // 10
    for first in range(0, 80, 20):
        assert len(set(order[first : first + 20])) == 2
    assert len(set(order[:10])) == 2  # mixed within the window


def test_a_set_without_samples_is_refused():
    with pytest.raises(BadShard, match="at least one"):
        OrderPlan([], seed=0)
