"""Closed-form pruning of channels and weights from inverse autocorrelation matrices."""

from rlscuda.optim.kept import Kept
from rlscuda.pruning.files.export import export_onnx, export_program
from rlscuda.pruning.files.saving import load_optimizer, load_pruned, save_pruned
from rlscuda.pruning.masks.weights import LayerMask, MaskReport, prune_weights
from rlscuda.pruning.matrices.sources import calibrate, disagreement, own_matrices
from rlscuda.pruning.matrices.tracker import SketchTracker
from rlscuda.pruning.pruner import RLSPruner
from rlscuda.pruning.ratios import ratio_after
from rlscuda.pruning.report import CouplingChange, PruneReport
from rlscuda.pruning.running.measure import Gains, Measurement, compare, measure
from rlscuda.pruning.schedule import PruneSchedule, Round
from rlscuda.pruning.surgery.any_optimizer import PruningRecord, transfer_state
from rlscuda.pruning.surgery.snapshot import Snapshot

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
