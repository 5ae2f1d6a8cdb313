"""The options of pruning, read from their texts and checked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.options import (
    check_options,
    flag_of,
    option,
    read_amount,
    read_list,
    read_ratio,
    read_rise,
)
from rlscuda.pruning.choice.ranking import IMPORTANCES

EXPORTS = {"onnx": "model.onnx", "pt2": "model.pt2"}
_TARGETS = ("ratio", "target_flops", "target_params", "max_loss")


@dataclass(frozen=True)
class PruneOptions:
    """The options of `rlscuda prune` that decide what is removed."""

    ratio: str | None = option(
        None, "Share of the channels to remove: 0.7, 70% or conv*=0.5,fc1=0.8."
    )
    target_flops: str | None = option(None, "FLOPs an image to get down to: 1.5M, or 0.5x or 50%.")
    target_params: str | None = option(None, "Parameters to get down to: 250k, or 0.5x or 50%.")
    max_loss: str | None = option(
        None, "Remove what the validation loss allows: it may rise by 0.1 or 10%."
    )
    what: str = option(
        "channels",
        "channels, or channels,blocks: residual branches may go, or become linear maps.",
        choices=("channels", "channels,blocks"),
    )
    importance: str = option(
        "saliency", f"What ranks the channels: {', '.join(IMPORTANCES)}.", choices=IMPORTANCES
    )
    selection: str | None = option(
        None,
        "greedy (one at a time, all else downdated) or one-shot.",
        choices=("greedy", "one-shot"),
    )
    scope: str = option(
        "layer",
        "layer (the same share of each) or global (what costs least for what it saves).",
        choices=("layer", "global"),
    )
    source: str | None = option(
        None,
        "Of the matrices: own (those that rls trained with) or calibration (from training "
        "images); own where the run has them.",
        choices=("own", "calibration"),
    )
    round_to: int = option(1, "Keep a multiple of this many channels.", least=1)
    compensate: bool = option(True, "Change the remaining weights to make up for what goes.")
    adapt_norms: bool = option(True, "Let the statistics of batch norms follow the cut.")
    calibration_images: int = option(
        1000, "Training images that calibrate, or that own matrices are held to.", least=1
    )
    recover: int = option(0, "Epochs to train on, with the same optimizer.", least=0)
    recover_lr: float | None = option(
        None, "Their first step size; .3 of the run's for RLS, else a fifth.", above=0
    )
    export: str | None = option(None, "Comma list of onnx and pt2 (torch.export).")
    measure_batch: int | None = option(
        None, "Images of the forward that is timed; the run's batch by default.", least=1
    )

    def __post_init__(self) -> None:
        """Checks all that can be checked without the run."""
        given = [flag_of(name) for name in _TARGETS if getattr(self, name)]
        if len(given) != 1:
            raise UserError(
                "say how much to remove, by one of --ratio, --target-flops, --target-params and "
                f"--max-loss; got {' and '.join(given) or 'none'}"
            )
        check_options(self)
        if self.selection == "greedy" and self.importance != "saliency":
            raise UserError(
                f"--selection greedy is for --importance saliency, got {self.importance}"
            )
        if self.recover_lr is not None and not self.recover:
            raise UserError("--recover-lr is the step size of --recover EPOCHS, which is missing")
        if "blocks" in self.what and not (self.target_flops or self.target_params):
            raise UserError("--what channels,blocks takes --target-flops or --target-params")
        if "blocks" in self.what and self.source == "own":
            raise UserError("--what channels,blocks takes --source calibration: the own matrices "
                            "are of the network with its blocks")  # fmt: skip
        _ = self.exports, self.target

    @property
    def exports(self) -> tuple[str, ...]:
        """The formats to export to.

        Raises:
            UserError: An unknown one, or one twice.
        """
        return read_list("--export", self.export, EXPORTS, "format") if self.export else ()

    @property
    def target(self) -> dict[str, Any]:
        """How much goes, as the argument of `RLSPruner`."""
        if self.ratio:
            ratio = read_ratio(self.ratio)
            if self.scope == "global" and isinstance(ratio, dict):
                raise UserError(
                    f"--ratio must be one number with --scope global, got {self.ratio!r}"
                )
            return {"ratio": ratio}
        if self.max_loss:
            return {"max_loss": read_rise("--max-loss", self.max_loss)}
        name = "target_flops" if self.target_flops else "target_params"
        return {name: read_amount(flag_of(name), getattr(self, name))}
