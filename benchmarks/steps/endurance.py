"""Where steps lose their footing: `python -m benchmarks.steps.endurance`, 100,000 steps a task.

Constant rates, so that nothing shrinks a step but the optimizer: losses that reach 0, units that
are dead, inputs a million times too small or too large. A run must stay finite and reset no `P`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import environment
from rlscuda import RLSOptimizer

RESULT = Path(__file__).resolve().parents[1] / "results" / "endurance.json"
Loss = Callable[[], Tensor]


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                         nn.Linear(64, 5))  # fmt: skip


def zero_target(rows: Tensor) -> tuple[nn.Module, Loss]:
    """Regression on 0, which a network without biases can be: gradients vanish altogether."""
    layers = [nn.Linear(20, 64, bias=False), nn.ReLU(), nn.Linear(64, 5, bias=False)]
    model = nn.Sequential(*layers)
    return model, lambda: model(rows.normal_()).square().mean()


def memorised(rows: Tensor) -> tuple[nn.Module, Loss]:
    """32 rows with a class each, again and again: the loss of float32 reaches 0."""
    model, classes = _network(), torch.arange(32) % 5
    rows.normal_()
    return model, lambda: nn.functional.cross_entropy(model(rows), classes)


def dead_units(rows: Tensor) -> tuple[nn.Module, Loss]:
    """Half the inputs are 0, half the hidden units never fire, and a layer sees nothing but 0."""
    model = _network()
    with torch.no_grad():
        model[0].bias[:32] = -1e3
        model[2].bias[:] = -1e3
    teacher = torch.randn(10, 5)

    def loss() -> Tensor:
        rows.normal_()[:, 10:] = 0
        return nn.functional.cross_entropy(model(rows), (rows[:, :10] @ teacher).argmax(1))

    return model, loss


def constant_input(rows: Tensor) -> tuple[nn.Module, Loss]:
    """One row, always the same: every A has rank one."""
    model = _network()
    row, target = torch.randn(1, 20).expand_as(rows), torch.randn(len(rows), 5)
    return model, lambda: (model(row) - target).square().mean()


def scaled(factor: float) -> Callable[[Tensor], tuple[nn.Module, Loss]]:
    """A linear teacher's classes of inputs that are `factor` times the usual."""

    def build(rows: Tensor) -> tuple[nn.Module, Loss]:
        model, teacher = _network(), torch.randn(20, 5)

        def loss() -> Tensor:
            classes = (rows.normal_() @ teacher).argmax(1)
            return nn.functional.cross_entropy(model(rows * factor), classes)

        return model, loss

    return build


TASKS = {
    "zero target": zero_target,
    "memorised": memorised,
    "dead units": dead_units,
    "constant input": constant_input,
    "inputs x 1e-6": scaled(1e-6),
    "inputs x 1e6": scaled(1e6),
}


def run(task: str, form: str, steps: int, seed: int = 0) -> dict[str, object]:
    """What became of one run: its last loss, its largest weight, and what `health()` counts.

    Args:
        task: One of `TASKS`.
        form: Form of the rule, with its own defaults.
        steps: How many.
        seed: Of the network and the data.
    """
    torch.manual_seed(seed)
    model, loss_of = TASKS[task](torch.empty(32, 20))
    optimizer = RLSOptimizer(model, form=form)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
    counts = optimizer.health().values()
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return {
        "task": task, "form": form, "steps": steps, "loss": loss.item(),
        "largest_weight": max(p.abs().max().item() for p in model.parameters()),
        "finite": all(bool(t.isfinite().all()) for t in (*model.parameters(), *state)),
        "resets": sum(row.resets for row in counts),
        "refused": sum(row.refused for row in counts),
    }  # fmt: skip


def failed(row: dict[str, object]) -> bool:
    """Whether a run ended with something that is not finite, or needed a reset."""
    return not row["finite"] or bool(row["resets"]) or bool(row["refused"])


def main() -> None:
    """Runs every task by every form; ends with an error where one lost its footing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--forms", nargs="*", default=["spectral", "adaptive"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hashed = {"source_hash": environment.built_hash()}
    facts = environment.machine() | environment.versions() | hashed
    rows = []
    for form in arguments.forms:
        for task in TASKS:
            rows.append(run(task, form, arguments.steps))
            print(rows[-1], flush=True)
            RESULT.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    if any(map(failed, rows)):
        raise SystemExit(f"lost its footing: {list(filter(failed, rows))}")


if __name__ == "__main__":
    main()
