"""Two processes and one folder, and processes that are killed: refused, or whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli import ROOT, call, run_in, snapshot, subprocess_environment, working_copy

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.out_folder import check_free, writing
from rlscuda.cli.common.swap import finish, is_pending, replaced
from rlscuda.cli.train import command as train_module
from rlscuda.cli.train.run_folder import RunFolder
from rlscuda.files.atomic import lock, write_atomically, write_text

PRUNE = ("prune", "--run", "run", "--ratio", 0.5)
TRAIN = ("train", "--model", "mlp", "--data", "data.npz", "--optimizer", "sgd", "--epochs", 1,
         "--batch-size", 20, "--out", "run")  # fmt: skip
RESUME = ("train", "--resume", "--out", "run")
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run and its pruning, made once."""
    return run_in(tmp_path_factory.mktemp("trained"), TRAIN, (*PRUNE, "--source", "calibration"))


@pytest.fixture
def folder(tmp_path, trained):
    """A copy of that folder, which is the current one."""
    with working_copy(trained, tmp_path) as copy:
        yield copy


@pytest.fixture
def other_process():
    """Starts a process that holds a folder until it is killed."""
    started = []

    def hold(folder: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", HOLD, f"{folder}/.rlscuda.lock"]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


# Two processes, one folder


@pytest.mark.parametrize(
    ("held", "argv"),
    [
        ("run", TRAIN),
        ("run", (*TRAIN, "--overwrite")),
        ("run", RESUME),
        ("run", (*PRUNE, "--out", "other")),
        ("run-pruned", (*PRUNE, "--overwrite")),
    ],
)
def test_a_folder_that_another_process_writes_is_refused(folder, capsys, other_process, held, argv):
    process = other_process(held)
    before = snapshot(folder)
    status, out, error = call(capsys, *argv)
    assert status == 1 and out == "" and error.count("\n") == 1
    assert f"{held} is being written by another process of rlscuda: wait until it has" in error
    assert snapshot(folder) == before
    process.kill()
    process.communicate()
    status, _, error = call(capsys, *argv)
    assert "another process" not in error
    assert status == (argv == TRAIN)  # which a run that is there refuses


def test_a_lock_lasts_as_long_as_its_process_and_leaves_nothing(folder, other_process):
    other_process("run").kill()
    with writing(Path("run")):
        with pytest.raises(UserError, match="run is being written by another"):
            check_free(Path("run"))
        with (
            pytest.raises(UserError, match="run is being written by another"),
            writing(Path("run")),
        ):
            pass
    check_free(Path("run"))
    assert not (folder / "run" / ".rlscuda.lock").exists()
    Path("run/.rlscuda.lock").touch()  # as of a killed process
    check_free(Path("run"))
    assert not (folder / "run" / ".rlscuda.lock").exists()
    with pytest.raises(KeyError), writing(Path("a/b/c")):
        raise KeyError
    assert not (folder / "a").exists()
    with writing(Path("a/b/c")):
        write_text(Path("a/b/c/file"), "kept")
    assert snapshot(folder / "a") == {"b/c/file": b"kept"}


def test_where_the_file_system_has_no_locks_a_line_says_so(folder, capsys, monkeypatch):
    monkeypatch.setattr("rlscuda.cli.common.out_folder.lock", lambda *_, **__: None)
    status, _, error = call(capsys, *TRAIN, "--overwrite")
    assert status == 0 and error.count("\n") == 1
    assert "run is on a file system without locks: nothing else may write to it now" in error


def test_a_run_that_is_replaced_while_it_is_read_is_told(folder, capsys, monkeypatch):
    def replaced_meanwhile(*arguments, **keywords):
        write_text(Path("run/config.json"), Path("run/config.json").read_text())
        return load(*arguments, **keywords)

    load = train_module.load_checkpoint
    monkeypatch.setattr(train_module, "load_checkpoint", replaced_meanwhile)
    before = snapshot(folder)
    status, _, error = call(capsys, *PRUNE, "--out", "other")
    assert status == 1 and "run was changed by another process while it was read" in error
    assert snapshot(folder) == before


def test_writers_of_one_file_are_not_in_each_others_way(tmp_path):
    path = tmp_path / "file"

    def write_again(stream):
        stream.write(b"outer ")
        write_text(path, "inner")
        assert path.read_bytes() == b"inner"
        assert len(list(tmp_path.iterdir())) == 2  # the writer's own is in use, no leftover
        stream.write(b"whole")

    write_atomically(path, write_again)
    assert snapshot(tmp_path) == {"file": b"outer whole"}


def test_what_killed_writers_left_is_removed(tmp_path):
    (tmp_path / f".rlscuda-{'0' * 16}.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"mine")
    in_use = tmp_path / f".rlscuda-{'1' * 16}.tmp"
    with open(in_use, "wb") as file:
        assert lock(file.fileno())
        write_text(tmp_path / "file", "new")
        assert set(snapshot(tmp_path)) == {"file", ".mine.tmp", in_use.name}
    write_text(tmp_path / "file", "newer")
    assert set(snapshot(tmp_path)) == {"file", ".mine.tmp"}


# Killed


OLD = {"a": b"old", "b": b"old", "sub/c": b"old", "note": b"mine"}
NEW = {"a": b"new", "d": b"new", "note": b"mine"}


def old_files(folder: Path) -> list[Path]:
    return [path for name in ("a", "b", "sub/c", "d") if (path := folder / name).is_file()]


def replace_files(folder: Path) -> None:
    with replaced(folder, old_files(folder)) as new:
        write_text(new / "a", "new")
        write_text(new / "d", "new")


def killed_before(number: int, task, *arguments) -> bool:
    """Whether a forked child was killed before its operation of that number on names."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    try:
        count = 0

        def hook(event: str, _: tuple) -> None:
            nonlocal count
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        task(*arguments)
        os._exit(0)
    finally:
        os._exit(1)


def test_files_replaced_together_are_the_old_or_the_new_ones_wherever_it_is_killed(tmp_path):
    outcomes, kills = [], 0
    while True:
        folder = tmp_path / str(kills)
        for name, data in OLD.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        if not killed_before(kills + 1, replace_files, folder):
            break
        kills += 1
        assert (folder / "a").is_file() and (folder / "note").is_file()
        expected = NEW if is_pending(folder) or snapshot(folder) == NEW else OLD
        again = kills % 3 + 1  # those that go on are killed, too
        while killed_before(again, finish, folder, old_files(folder)):
            again += 3
        assert snapshot(folder) == expected
        outcomes.append(expected)
    assert snapshot(folder) == NEW
    assert outcomes.count(OLD) > 5 and outcomes.count(NEW) > 5


def test_a_new_run_whose_start_was_killed_is_resumed_or_started_again(folder, capsys, monkeypatch):
    old = snapshot(folder / "run")

    def killed(*arguments):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr("rlscuda.cli.common.swap.finish", killed)
        assert call(capsys, *TRAIN, "--seed", 1, "--overwrite")[0] == 9
    assert is_pending(folder / "run") and old.items() <= snapshot(folder / "run").items()
    status, _, error = call(capsys, *PRUNE, "--out", "other")
    assert status == 1 and "run is not finished: rlscuda train --resume --out run" in error
    status, _, error = call(capsys, *TRAIN)
    assert status == 1 and "already holds a run: --resume continues it" in error
    assert RunFolder(Path("run")).read_config()["options"]["seed"] == 1
    assert call(capsys, *RESUME)[0] == 0
    resumed = snapshot(folder / "run")
    assert resumed.keys() == old.keys()


def test_killed_commands_go_on():
    """A sample of what `tests/attack/kills.py` does everywhere."""
    argv = [sys.executable, "kills.py", "--only", "prune --overwrite", "--every", "20"]
    ended = subprocess.run(
        argv, cwd=ROOT / "tests" / "attack", env=subprocess_environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.endswith(" kills, 0 lost\n")
