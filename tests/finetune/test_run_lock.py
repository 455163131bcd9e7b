"""Two writers: the second is told who is first, and a killed one leaves no lock."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tiltune.finetune.runs.lock import RunLock

HOLD = """
import sys
from pathlib import Path
from tiltune.finetune.runs.lock import RunLock
with RunLock(Path(sys.argv[1])):
    {inside}
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(folder: Path, inside: str = "pass") -> subprocess.Popen[str]:
    code = HOLD.format(inside=inside)
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) and "held" not in line:
        pass
    assert line
    return process


def test_a_second_writer_is_refused_by_name_until_the_first_is_done(tmp_path: Path) -> None:
    process = holder(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"process {process.pid} on {socket.gethostname()}; wait until"), RunLock(tmp_path):
            pass
    process.communicate("go on\n")
    with RunLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_lock_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} on"), RunLock(tmp_path):
        pass
    (tmp_path / "other").mkdir()
    with RunLock(tmp_path), RunLock(tmp_path / "other"):  # control
        pass


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock").exists()  # the file alone locks nothing
    with RunLock(tmp_path):
        pass


def test_a_forked_worker_does_not_keep_the_lock_of_its_killed_parent(tmp_path: Path) -> None:
    fork = """import os, time
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, b"running")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 7)
"""
    process = holder(tmp_path, fork)
    with pytest.raises(ValueError, match="is being written"), RunLock(tmp_path):  # control: the parent has it
        pass
    process.kill()
    process.wait()
    try:
        with RunLock(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the worker
        process.communicate()


def test_a_forked_worker_that_leaves_the_block_leaves_the_lock_to_its_parent(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            with pytest.raises(ValueError, match=f"process {os.getpid()} on"), RunLock(tmp_path):
                pass
    if not child:
        os._exit(0)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_goes_while_it_is_being_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder left between our opening its file and our locking it; a third would then lock a new file beside us."""
    lock, left = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        lock(descriptor, operation)
        if not left:
            left.append((tmp_path / ".lock").unlink())

    monkeypatch.setattr(fcntl, "flock", late)
    with RunLock(tmp_path):
        assert left
        with pytest.raises(ValueError, match="is being written"), RunLock(tmp_path):
            pass


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(OSError, match=r"\.lock"), RunLock(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "kept"
