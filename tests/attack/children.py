"""Commands in child processes that are forked, so that PyTorch is imported once for all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child has no thread but its own
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # what commands import is imported before the fork
import torch_pruning  # noqa: E402, F401
from support.cli import TIMES, write_npz  # noqa: E402

from rlscuda.cli import app, main  # noqa: E402, F401
from rlscuda.cli.prune import command as prune  # noqa: E402, F401
from rlscuda.cli.report import writing  # noqa: E402
from rlscuda.cli.train import command as train  # noqa: E402
from rlscuda.files import atomic  # noqa: E402
from rlscuda.pruning.running import measure  # noqa: E402

torch.set_num_threads(1)
# What takes long and writes as much as any other thing: drawings, latencies.
train.plot_run = lambda path, *_: atomic.write_text(path, "curves")
writing.draw_svg = lambda record: {}
writing.render_page = lambda *_: "page"
measure._latency = lambda *_: 1.0

MODEL = """
from torch import nn

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(4 * 36, 10), nn.ReLU(), nn.Linear(10, num_classes))
"""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Child:
    """A command that has been started.

    Attributes:
        pid: its process.
        folder: of its output.
    """

    pid: int
    folder: Path

    def wait(self) -> Ended:
        """Wait for its end."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        texts = [(self.folder / name).read_text() for name in ("out", "error")]
        shutil.rmtree(self.folder)
        return Ended(status, *texts)


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        status: exit status; of a killed process the negative signal.
        out: stdout.
        error: stderr.
    """

    status: int
    out: str
    error: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def refused(self) -> bool:
        """Whether it ended with one clear line."""
        one_line = self.error.startswith("error: ") and self.error.count("\n") == 1
        return self.status == 1 and one_line


def start(work: Path, task: Callable[[], object]) -> Child:
    """Run a function in a child process whose current folder is ``work``."""
    folder = Path(tempfile.mkdtemp())
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Child(pid, folder)
    status = 70
    try:
        os.chdir(work)
        for descriptor, name in ((1, "out"), (2, "error")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
        task()
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def command(work: Path, *argv: object, kill_at: int = 0) -> Child:
    """Start ``rlscuda`` in ``work``, to be killed before its file operation number ``kill_at``."""

    def task() -> None:
        sys.path.insert(0, str(work))
        if kill_at:
            kill_before(work, kill_at)
        main([str(argument) for argument in argv])

    return start(work, task)


def count_operations(work: Path, *argv: object) -> int:
    """Run ``rlscuda`` to its end; how many file operations it made in ``work``."""
    read, write = os.pipe()

    def task() -> None:
        sys.path.insert(0, str(work))
        events = kill_before(work, -1)
        try:
            main([str(argument) for argument in argv])
        finally:
            os.write(write, str(len(events)).encode())

    ended = start(work, task).wait()
    assert ended.status == 0, ended.error
    os.close(write)
    with os.fdopen(read) as stream:
        return int(stream.read())


def kill_before(work: Path, number: int) -> list[str]:
    """Kill this process before the file operation of that number in ``work``; lists them."""
    events: list[str] = []
    fsync, folder = os.fsync, str(work)

    class File(atomic._File):
        def write(self, data) -> int:
            sys.audit("rlscuda.write", self.name)
            return super().write(data)

    def audited_fsync(descriptor: int) -> None:
        sys.audit("rlscuda.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def hook(event: str, arguments: tuple) -> None:
        changes = event in (
            "os.rename", "os.remove", "os.mkdir", "os.rmdir", "rlscuda.write", "rlscuda.fsync"
        )  # fmt: skip
        if not changes and not (event == "open" and arguments[2] & WRITES):
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike) or "__pycache__" in str(path):
            return
        if os.path.abspath(os.fsdecode(path)).startswith(folder):
            events.append(event)
            if len(events) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    atomic._File, os.fsync = File, audited_fsync  # type: ignore[misc]
    sys.addaudithook(hook)
    return events


def make_work() -> Path:
    """A folder with a data set and a model."""
    work = Path(tempfile.mkdtemp()).resolve()
    (work / "killable.py").write_text(MODEL)
    write_npz(work / "data.npz")
    sys.path.insert(0, str(work))
    __import__("killable")
    sys.path.pop(0)
    return work


def content(folder: Path) -> dict[str, object]:
    """What every file in a folder holds, without what the clock decides; hidden files too."""
    return {
        str(path.relative_to(folder)): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def visible(contents: dict[str, object]) -> dict[str, object]:
    """The content without hidden files and those in hidden folders."""
    return {
        name: value
        for name, value in contents.items()
        if not any(part.startswith(".") for part in Path(name).parts)
    }


def _content(path: Path) -> object:
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".pt":
        return _frozen(torch.load(path, weights_only=True)["training"])
    if path.suffix == ".safetensors":
        return _frozen(safetensors.torch.load_file(path))
    return None if path.suffix in (".html", ".png", ".csv") else path.read_bytes()


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: _timeless(item)
            for key, item in value.items()
            if key not in TIMES and key not in ("seconds", "ratios")
        }
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _frozen(value: object) -> object:
    """The value with bytes in place of tensors, so that equality is that of every bit."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), data
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items() if key not in TIMES}
    return [_frozen(item) for item in value] if isinstance(value, list | tuple) else value
