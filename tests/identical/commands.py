"""The command line: training, stopped and resumed, and pruning."""

from __future__ import annotations

import itertools
import runpy
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from compare import differences
from networks import write_folders
from recording import scenario, write
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rlscuda import RLSOptimizer

TRAIN = "train --data ../data.npz --epochs 3 --batch-size 27 --checkpoint-every 2 --out run"
WHOLE = f"{TRAIN} --model networks:noisy --optimizer sgd,rls,adam"
ROUNDS = f"{TRAIN} --model networks:noisy --prune-schedule linear:0.5:2,tolerance=1000%"
RESNET = f"{TRAIN} --model resnet20 --prune-schedule one_shot:0.3:1"
PRUNINGS = {
    "ratio": "--ratio 0.5 --recover 1 --export onnx,pt2",
    "by_name": "--ratio body.0=0.5,body.6=25% --optimizer rls --round-to 2",
    "flops": "--target-flops 0.6x --source calibration --measure-batch 3",
    "params": "--target-params 60% --scope global --calibration-images 40",
    "loss": "--max-loss 10% --optimizer adam --recover 1 --recover-lr .001",
    "one_shot": "--ratio 0.4 --selection one-shot --no-adapt-norms",
    "sgd": "--ratio 0.4 --optimizer sgd --recover 1",
    "l1": "--ratio 0.4 --importance l1 --no-compensate",
    "l2": "--ratio 0.4 --importance l2 --no-compensate",
    "taylor": "--ratio 0.4 --importance taylor --no-compensate",
    "bn_scale": "--ratio 0.4 --importance bn_scale",
    "random": "--ratio 0.4 --importance random",
}


def command(line: str, out: str = "printed.out", status: int = 0) -> None:
    """What `python -m rlscuda.cli` does, in this process; what it prints goes to a file."""
    printed, argv = StringIO(), sys.argv
    sys.argv = ["rlscuda", *line.split()]
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            runpy.run_module("rlscuda.cli", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if (ended.code or 0) != status:
            raise RuntimeError(f"{line!r} must end with {status}, got {ended.code}:\n"
                               f"{printed.getvalue()}") from None  # fmt: skip
    finally:
        sys.argv = argv
    write(out, printed.getvalue())


def interrupted(line: str, steps: int) -> None:
    """A command that is interrupted after so many steps of RLS."""
    count = itertools.count()

    def stop(optimizer: Optimizer, *arguments: object) -> None:
        if isinstance(optimizer, RLSOptimizer) and next(count) == steps:
            raise KeyboardInterrupt

    hook = register_optimizer_step_pre_hook(stop)
    try:
        command(line, status=130)
    finally:
        hook.remove()


def resumed(stopped: Path, whole: Path) -> None:
    """The run goes on where it was stopped, and ends as the one that was not."""
    shutil.copytree(stopped / "run", "run")
    command("train --resume --out run")
    _, found = differences(whole / "run", Path("run"))
    if found:
        raise RuntimeError("a resumed run must end as the whole one, got\n" + "\n".join(found[:9]))


@scenario()
def train_whole() -> None:
    command(WHOLE)


@scenario()
def train_stopped() -> None:
    interrupted(WHOLE, 5)  # in the second epoch of the second optimizer


@scenario("train_stopped", "train_whole")
def train_resumed(stopped: Path, whole: Path) -> None:
    resumed(stopped, whole)


@scenario()
def rounds_whole() -> None:
    command(ROUNDS)


@scenario()
def rounds_stopped() -> None:
    interrupted(ROUNDS, 5)  # while a round recovers


@scenario("rounds_stopped", "rounds_whole")
def rounds_resumed(stopped: Path, whole: Path) -> None:
    resumed(stopped, whole)


@scenario()
def resnet_whole() -> None:
    command(RESNET)


@scenario()
def resnet_stopped() -> None:
    interrupted(RESNET, 5)


@scenario("resnet_stopped", "resnet_whole")
def resnet_resumed(stopped: Path, whole: Path) -> None:
    resumed(stopped, whole)


@scenario()
def rounds_rolled_back() -> None:
    """A round cannot recover where no step moves anything."""
    command(f"{TRAIN} --model networks:noisy --prune-schedule one_shot:0.8:1,budget=1 "
            "--lr rls=1e-9 --schedule constant")  # fmt: skip


@scenario()
def train_options() -> None:
    write_folders(Path("pictures"))
    of_archive = "--data ../data.npz --val-fraction 0.3 --weight-decay 0.1 --seed 3 --model mlp"
    of_folders = "--data pictures --image-size 8 --model"
    for number, options in enumerate((
        f"{of_archive} --form paper --out paper",
        f"{of_archive} --form natural --out natural",
        f"{of_archive} --form paper --lr 0.1 --out natural --overwrite",
        f"{of_folders} resnet20 --out resnet20",
        f"{of_folders} vgg16 --optimizer sgd --out vgg16",
    )):  # fmt: skip
        command(f"train --epochs 1 --batch-size 9 {options}", f"{number}.out")
    shutil.rmtree("pictures")


@scenario()
def demo() -> None:
    """What `make demo` does, in short."""
    command("train --model lenet5 --data mnist5k --epochs 1 --batch-size 300 --out run")
    command("prune --run run --ratio 0.7 --out pruned", "pruned.out")


@scenario("train_whole")
def prune_run(whole: Path) -> None:
    Path("run").symlink_to(whole / "run")
    for name, options in PRUNINGS.items():
        command(f"prune --run run --out {name} {options}", f"{name}.out")
    Path("run").unlink()
