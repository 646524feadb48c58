"""Two nodes: two network namespaces of this machine, joined by a pair of virtual interfaces."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.__main__ import main
from launch.export import load_export
from tests.train.conftest import ROOT, free_port
from tests.train.forks import run_cases

TINY = str(ROOT / "configs" / "tiny.yaml")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


class Nodes:
    """Two namespaces; addresses in a network that is theirs alone.

    Attributes:
        names: Of the namespaces; no other process uses them.
        interfaces: One in each, a pair.
        addresses: Of the interfaces.
    """

    def __init__(self) -> None:
        self.names = [f"pafukv-{os.getpid()}-{n}" for n in range(2)]
        self.interfaces = [f"pv{os.getpid() % 10**8}{'ab'[n]}" for n in range(2)]
        self.addresses = ["10.213.7.1", "10.213.7.2"]

    def create(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        one, other = self.interfaces
        ip("link", "add", one, "type", "veth", "peer", "name", other)
        for name, interface, address in zip(
            self.names, self.interfaces, self.addresses, strict=True
        ):
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Remove whatever there is; with a namespace go its interface and the peer of that."""
        for words in [["netns", "delete", name] for name in self.names]:
            subprocess.run(["ip", *words], check=False, capture_output=True, timeout=20)
        command = ["ip", "link", "delete", self.interfaces[0]]
        subprocess.run(command, check=False, capture_output=True, timeout=20)

    def start(self, number: int, command: list) -> subprocess.Popen:
        """Start a command on a node; it is killed if it hangs."""
        own = {"GLOO_SOCKET_IFNAME": self.interfaces[number]}
        words = ["ip", "netns", "exec", self.names[number], "timeout", "-k", "10", "180"]
        return subprocess.Popen([*words, *map(str, command)], env=clean_environ(own), cwd=ROOT)


def clean_environ(own: dict[str, str]) -> dict[str, str]:
    """The environment without what a launcher or a test before may have left in it."""
    left = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    kept = {key: value for key, value in os.environ.items() if key not in left}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | own


@pytest.fixture(scope="module")
def nodes():
    made = Nodes()
    if shutil.which("ip") is None:
        unable("the program `ip` (package iproute2)")
    try:
        made.create()
        yield made
    except subprocess.CalledProcessError as error:
        unable(f"the right to make network namespaces ({error.stderr.strip()})")
    finally:
        made.remove()


def unable(missing: str) -> None:
    """Skip, or fail where the environment says that this machine must be able."""
    message = f"two nodes need network namespaces, missing: {missing}"
    if os.environ.get("REQUIRE_NAMESPACES") == "1":
        pytest.fail(message)
    pytest.skip(message)


def same_tensors(one: Path, other: Path) -> None:
    expected, found = load_file(one), load_file(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def bytes_sent(nodes: Nodes) -> int:
    path = f"/sys/class/net/{nodes.interfaces[0]}/statistics/tx_bytes"
    command = ["ip", "netns", "exec", nodes.names[0], "cat", path]
    return int(subprocess.run(command, check=True, capture_output=True, timeout=20).stdout)


def torchrun(nodes: Nodes, number: int, rendezvous: str, port: str) -> list[str]:
    """What starts the process of one node."""
    host, own = nodes.addresses[0], nodes.addresses[number]
    common = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", f"--local-addr={own}"]
    if rendezvous == "static":
        return [*common, f"--node-rank={number}", f"--master-addr={host}", f"--master-port={port}"]
    # Both nodes have this machine's name, so that neither knows by itself who is the host.
    is_host = f"--rdzv-conf=is_host={number == 0}"
    return [
        *common,
        "--rdzv-backend=c10d",
        "--rdzv-id=two",
        f"--rdzv-endpoint={host}:{port}",
        is_host,
    ]


@pytest.fixture(scope="module")
def trained(nodes, tmp_path_factory) -> Path:
    """Folders `one` and `two`: the same training by two ranks on one node, and by two nodes."""
    environs = [
        {"GLOO_SOCKET_IFNAME": interface, "MASTER_ADDR": nodes.addresses[0]}
        for interface in nodes.interfaces
    ]
    two = [
        {"namespace": name, "environ": environ}
        for name, environ in zip(nodes.names, environs, strict=True)
    ]
    words = ["--strategy", "deepspeed"]
    folder = tmp_path_factory.mktemp("nodes")
    found = run_cases(
        {"one": {"words": words}, "two": {"words": words, "nodes": two}}, folder=folder
    )
    for name, ranks in found.items():
        assert [rank["status"] for rank in ranks] == [0, 0], (name, ranks)
    return folder


@pytest.mark.timeout(300)
def test_two_nodes_train_to_the_bits_of_two_ranks_on_one(nodes, trained):
    same_tensors(trained / "one" / "final.safetensors", trained / "two" / "final.safetensors")
    assert bytes_sent(nodes) > 10_000  # the ranks have talked over the link


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_with_a_fixed_address_starts_one_rank_per_node(nodes, trained, tmp_path):
    toy = ["-m", "tests.train.toy", tmp_path / "run", "--strategy", "deepspeed"]
    port = str(free_port())
    processes = [
        nodes.start(number, [*torchrun(nodes, number, "static", port), *toy]) for number in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    same_tensors(trained / "one" / "final.safetensors", tmp_path / "run" / "final.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_stage_on_two_nodes_ends_with_the_weights_of_two_ranks_on_one(nodes, tmp_path):
    plan = [TINY, "trainer.strategy=deepspeed", "trainer.accelerator=cpu"]
    for verb in ("world", "ingest", "encode"):
        assert main([verb, *plan, f"runs_dir={tmp_path / 'one'}"]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def fit(runs: str) -> list[str]:
        return ["-m", "launch", "fit", *plan, f"runs_dir={tmp_path / runs}", "--stage", "teacher"]

    port = str(free_port())
    processes = [
        nodes.start(number, [*torchrun(nodes, number, "c10d", port), *fit("two")])
        for number in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *fit("one")]
    subprocess.run(
        ["timeout", "-k", "10", "350", *command], env=clean_environ({}), cwd=ROOT, check=True
    )
    exports = [load_export(tmp_path / runs / "tiny" / "teacher") for runs in ("one", "two")]
    assert exports[0].manifest["files"] == exports[1].manifest["files"]
