"""Closed-form pruning of channels and weights from inverse autocorrelation matrices."""

from rlscuda.pruning.export import export_onnx, export_program
from rlscuda.pruning.kept import Kept
from rlscuda.pruning.masks import LayerMask, MaskReport, prune_weights
from rlscuda.pruning.matrices import calibrate, disagreement, own_matrices
from rlscuda.pruning.measure import Gains, Measurement, compare, measure
from rlscuda.pruning.pruner import RLSPruner
from rlscuda.pruning.ratios import ratio_after
from rlscuda.pruning.report import CouplingChange, PruneReport
from rlscuda.pruning.saving import load_optimizer, load_pruned, save_pruned
from rlscuda.pruning.schedule import PruneSchedule, Round
from rlscuda.pruning.snapshot import Snapshot
from rlscuda.pruning.tracker import SketchTracker
from rlscuda.pruning.transfer import PruningRecord, transfer_state

__all__ = [
    "CouplingChange",
    "Gains",
    "Kept",
    "LayerMask",
    "MaskReport",
    "Measurement",
    "PruneReport",
    "PruneSchedule",
    "PruningRecord",
    "RLSPruner",
    "Round",
    "SketchTracker",
    "Snapshot",
    "calibrate",
    "compare",
    "disagreement",
    "export_onnx",
    "export_program",
    "load_optimizer",
    "load_pruned",
    "measure",
    "own_matrices",
    "prune_weights",
    "ratio_after",
    "save_pruned",
    "transfer_state",
]
