"""What a run is: the options that decide its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.options import (
    Option,
    check_options,
    flag_of,
    one_of,
    option,
    read_list,
    read_pairs,
    resumed,
)
from rlscuda.cli.train.pruning.specs import AdaptiveSpec, GateSpec, ScheduleSpec
from rlscuda.optim.forms import FORMS
from rlscuda.pruning.gates.branches import SIZES
from rlscuda.pruning.schedule import CURVES
from rlscuda.zoo import NETWORKS

OPTIMIZERS = ("rls", "sgd", "adam")
SCHEDULES = ("cosine", "constant")
PRUNINGS: dict[str, Callable[[str], Any]] = {  # what reads the options of pruning
    "prune_schedule": ScheduleSpec.read,
    "prune_adaptive": AdaptiveSpec.read,
    "gates": GateSpec.read,
}
_POSITIVE = Option("Of a step size.", above=0)


@dataclass(frozen=True)
class RunConfig:
    """The options of `rlscuda train` that decide the result of a run."""

    model: str = option(
        "lenet5", f"{', '.join(NETWORKS)}, module:factory, torchvision:NAME or timm:NAME."
    )
    data: str = option(
        "mnist5k", "mnist5k, PATH.npz, torchvision:NAME or a folder of class folders."
    )
    optimizer: str = option("rls", "Comma list of rls, sgd, adam, trained in turn.")
    epochs: int = option(10, "Passes over the training images.", least=1)
    batch_size: int = option(64, "Images a step.", least=1)
    seed: int = option(
        0, "Of initial weights, data order and all else that is random.", least=0, most=2**63 - 1
    )
    lr: str | None = option(None, "Step size: 0.1, or rls=0.1,sgd=0.05.")
    weight_decay: str | None = option(None, "Weight decay: 0.01, or rls=0.05,adam=0.")
    schedule: str = option(
        "cosine", "cosine (to zero at the last step) or constant.", choices=SCHEDULES
    )
    form: str = option(
        "spectral", f"Form of the RLS update: {', '.join(FORMS)}.", choices=tuple(FORMS)
    )
    val_fraction: float = option(
        0.1, "Share of the training images that validates.", above=0, below=1
    )
    image_size: int | None = option(
        None, "Side that the images of a folder are resized to.", least=1
    )
    prune_schedule: str | None = option(
        None,
        "Prune while rls trains, CURVE:RATIO:ROUNDS: cubic:0.7:4, or with options, "
        f"linear:0.5:3,warmup=2,tolerance=5%,budget=4. Curves: {', '.join(CURVES)}.",
    )
    prune_adaptive: str | None = option(
        None,
        "Prune while rls trains until so many parameters are left, in channels and branches as "
        "the training finds: 50%, 0.5 or 250k, or with options, "
        "0.5,penalty=scale,what=channels+blocks,warmup=2,epochs=4.",
    )
    gates: str | None = option(
        None,
        "Let rls decide while it trains which residual branches lower the loss by a price: 0.03, "
        f"or with options, 0.03,by=flops,epochs=8. By: {', '.join(SIZES)}.",
    )

    def __post_init__(self) -> None:
        """Checks every value that can be checked without reading the data."""
        check_options(self)
        names = read_list("--optimizer", self.optimizer, OPTIMIZERS, "optimizer")
        for given, text in self.prunings.items():
            PRUNINGS[given](text)
        flags = [flag_of(given) for given in self.prunings]
        if len(flags) > 1:
            raise UserError(f"{' and '.join(flags)} exclude each other")
        if flags and "rls" not in names:
            raise UserError(f"{flags[0]} prunes while rls trains; --optimizer is {self.optimizer}")
        for name, value in self.overrides("lr").items():
            _POSITIVE.check(f"--lr of {name}", value)
        for name, value in self.overrides("weight_decay").items():
            if not 0.0 <= value < float("inf"):
                raise UserError(f"--weight-decay of {name} must be a number >= 0, got {value}")

    def check_new(self) -> None:
        """Checks what only a run that starts must fulfil; an older one can be resumed without.

        Raises:
            UserError: The pruning would not end, or never begin.
        """
        if self.prune_adaptive is not None:
            spec = AdaptiveSpec.read(self.prune_adaptive)
            end = spec.start(self.epochs) + spec.epochs
            if end >= self.epochs:
                raise UserError(
                    f"--prune-adaptive {self.prune_adaptive} prunes until after epoch {end} and "
                    f"trains on: --epochs must be at least {end + 1}, got {self.epochs}"
                )
        if self.gates is not None:
            learning = GateSpec.read(self.gates).learning(self.epochs)
            if learning >= self.epochs:
                raise UserError(
                    f"--gates {self.gates} learn until after epoch {learning} and what is left "
                    f"trains on: --epochs must be at least {learning + 1}, got {self.epochs}"
                )
        if self.prune_schedule is None:
            return
        warmup = ScheduleSpec.read(self.prune_schedule).warmup
        if warmup >= self.epochs:
            raise UserError(
                f"--prune-schedule {self.prune_schedule} first prunes after epoch {warmup} and "
                f"trains on: --epochs must be at least {warmup + 1}, got {self.epochs}"
            )

    @property
    def prunings(self) -> dict[str, str]:
        """The options of pruning that are given, by name."""
        given = {name: getattr(self, name) for name in PRUNINGS}
        return {name: text for name, text in given.items() if text is not None}

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers, in the order they are trained."""
        return tuple(name.strip() for name in self.optimizer.split(","))

    def overrides(self, option: str) -> dict[str, float]:
        """Values given on the command line for `lr` or `weight_decay`, by optimizer.

        Raises:
            UserError: The text is not `VALUE` or `NAME=VALUE,...` of this run's optimizers.
        """
        flag, text = flag_of(option), getattr(self, option)
        if text is None:
            return {}
        if "=" not in text:
            if len(self.optimizers) > 1:
                raise UserError(
                    f"{flag} {text} does not say which of {self.optimizer} it is for: expected "
                    + ",".join(f"{name}=VALUE" for name in self.optimizers)
                )
            return {self.optimizers[0]: _number(flag, text)}
        values = read_pairs(flag, text.split(","), text)
        for name in values:
            one_of(flag, name, self.optimizers)
        return {name: _number(flag, value) for name, value in values.items()}

    def fingerprint(self, data_fingerprint: str) -> str:
        """Hash that a checkpoint carries: same options and same data give the same hash.

        The place of the data does not count, its content does.
        """
        options = dataclasses.asdict(self)
        del options["data"]
        options["data_fingerprint"] = data_fingerprint
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()

    @classmethod
    def resumed(cls, stored: dict[str, Any], given: Mapping[str, Any]) -> RunConfig:
        """The config of an existing run, checked against the options given again.

        Args:
            stored: The options in the run's `config.json`.
            given: The options written on the command line now.

        Raises:
            UserError: The stored options are not those of a run, or an option given now differs
                from the stored one. Only `data` may: the files can have moved, and their
                fingerprint is checked.
        """
        return resumed(cls, "run", stored, given)


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{flag} expects a number, got {text!r}") from None
