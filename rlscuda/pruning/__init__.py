"""Closed-form pruning of channels and weights from inverse autocorrelation matrices."""

from rlscuda.optim.kept import Kept
from rlscuda.pruning.adaptive.pruner import AdaptivePruner
from rlscuda.pruning.adaptive.report import AdaptiveReport
from rlscuda.pruning.blocks.finding import Block, Blocks, find_blocks
from rlscuda.pruning.blocks.removal import BlockReport, remove_blocks
from rlscuda.pruning.blocks.shortening import BlockChange
from rlscuda.pruning.choice.ranking import IMPORTANCES
from rlscuda.pruning.files.export import export_onnx, export_program
from rlscuda.pruning.files.matrices import load_matrices, save_matrices
from rlscuda.pruning.files.saving import load_optimizer, load_pruned, save_pruned
from rlscuda.pruning.gates.layer_gates import LayerGates
from rlscuda.pruning.gates.report import GateReport, GateState
from rlscuda.pruning.masks.relief import ReliefMask, ReliefReport, prune_relief
from rlscuda.pruning.masks.units import remove_unread
from rlscuda.pruning.masks.weights import LayerMask, MaskReport, prune_weights
from rlscuda.pruning.matrices.calibration import calibrate, disagreement
from rlscuda.pruning.matrices.carried import CarriedMatrices
from rlscuda.pruning.matrices.explained import redundancies
from rlscuda.pruning.matrices.own import own_matrices
from rlscuda.pruning.matrices.tracker import SketchTracker
from rlscuda.pruning.pruner import RLSPruner
from rlscuda.pruning.report import CouplingChange, PruneReport
from rlscuda.pruning.running.measure import Gains, Measurement, compare, measure
from rlscuda.pruning.schedule import PruneSchedule, Round, ratio_after
from rlscuda.pruning.surgery.record import PruningRecord
from rlscuda.pruning.surgery.snapshot import Snapshot
from rlscuda.pruning.surgery.transaction import transfer_state

__all__ = [
    "IMPORTANCES",
    "AdaptivePruner",
    "AdaptiveReport",
    "Block",
    "BlockChange",
    "BlockReport",
    "Blocks",
    "CarriedMatrices",
    "CouplingChange",
    "Gains",
    "GateReport",
    "GateState",
    "Kept",
    "LayerGates",
    "LayerMask",
    "MaskReport",
    "Measurement",
    "PruneReport",
    "PruneSchedule",
    "PruningRecord",
    "RLSPruner",
    "ReliefMask",
    "ReliefReport",
    "Round",
    "SketchTracker",
    "Snapshot",
    "calibrate",
    "compare",
    "disagreement",
    "export_onnx",
    "export_program",
    "find_blocks",
    "load_matrices",
    "load_optimizer",
    "load_pruned",
    "measure",
    "own_matrices",
    "prune_relief",
    "prune_weights",
    "ratio_after",
    "redundancies",
    "remove_blocks",
    "remove_unread",
    "save_matrices",
    "save_pruned",
    "transfer_state",
]
