"""Long runs with an eye on memory: does a step keep anything? `python -m benchmarks.steps.soak`.

Trains a small MLP and a small CNN by each form, and AdamW beside them, and reads the resident
memory at every tenth of the run. The first tenth fills caches and pools and is left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import environment
from rlscuda import RLSOptimizer

RESULT = Path(__file__).resolve().parents[1] / "results" / "soak.json"
LIMIT_MIB = 4.0  # growth over nine tenths of a run; the leak that this was written for took 450


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def mlp() -> tuple[nn.Module, torch.Tensor]:
    """20-64-5, and 32 rows."""
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5)), torch.randn(32, 20)


def cnn() -> tuple[nn.Module, torch.Tensor]:
    """Two convolutions, a batch norm and a head, and 8 images."""
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 5)), torch.randn(8, 2, 8, 8)


OPTIMIZERS = {
    "spectral": RLSOptimizer,
    "adaptive": lambda model: RLSOptimizer(model, form="adaptive"),
    "paper": lambda model: RLSOptimizer(model, form="paper", lr=0.01),
    "natural": lambda model: RLSOptimizer(model, form="natural", lr=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.parameters()),
}


def soak(build, make, steps: int) -> list[float]:
    """Resident memory at each tenth of a run."""
    torch.manual_seed(0)
    model, x = build()
    optimizer = make(model)
    y = torch.randint(5, (len(x),))
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if (step + 1) % (steps // 10) == 0:
            seen.append(round(resident_mib(), 1))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return seen


def main() -> None:
    """Runs every network with every optimizer; ends with an error where memory grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hashed = {"source_hash": environment.built_hash()}
    facts = environment.machine() | environment.versions() | hashed
    rows = []
    for build in (mlp, cnn):
        for name in arguments.optimizers:
            seen = soak(build, OPTIMIZERS[name], arguments.steps)
            growth = round(max(seen[1:]) - seen[0], 1)
            rows.append({"network": build.__name__, "optimizer": name, "steps": arguments.steps,
                         "resident_mib": seen, "growth_mib": growth})  # fmt: skip
            print(f"{build.__name__:4} {name:9} {growth:+.1f} MiB, {seen}", flush=True)
            RESULT.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    grown = [r for r in rows if r["growth_mib"] > LIMIT_MIB]
    if grown:
        raise SystemExit(f"memory grew by more than {LIMIT_MIB} MiB: {grown}")


if __name__ == "__main__":
    main()
