"""A folder's product after a kill at each of its file operations."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from data.files import STARTED, claim_folder, is_whole, write_atomically

ROOT = Path(__file__).parents[2]


def write_product(folder, source):
    """A product of one file, the source's name."""
    if not claim_folder(folder, source, marker="whole.json", owned=("part-*",)):
        if not (folder / "part-0").exists():
            write_atomically(folder / "part-0", source.encode())
        write_atomically(folder / "whole.json", b'{"source_hash": "%s"}' % source.encode())
        (folder / STARTED).unlink()


def killed_at(operation, folder, source):
    """Write the product, killed before a numbered file operation; whether it came to that."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_files import write_product
left = {operation}
def count(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove") and str({str(folder)!r}) in str(arguments[0]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
write_product(Path({str(folder)!r}), {source!r})
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


@pytest.mark.parametrize("older", [None, "old"])
def test_a_folder_killed_at_any_file_operation_is_never_taken_for_whole_and_goes_on(
    tmp_path, older
):
    operation = 0
    while True:
        folder = tmp_path / str(operation)
        folder.mkdir()
        if older is not None:
            write_product(folder, older)
        was_killed = killed_at(operation, folder, "new")
        for source in ("old", "new"):
            if is_whole(folder, source, marker="whole.json"):
                assert (folder / "part-0").read_text() == source
        write_product(folder, "new")
        assert sorted(path.name for path in folder.iterdir()) == ["part-0", "whole.json"]
        assert (folder / "part-0").read_text() == "new"
        if not was_killed:
            break
        operation += 1
    assert operation > 8


def test_a_folder_of_someone_else_is_named_and_left_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"found notes\.txt"):
        write_product(tmp_path, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
