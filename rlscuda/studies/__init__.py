"""Controlled studies: whole experiments as one call, resumable, with one table and one JSON.

They use the library and nothing of it uses them.
"""

from rlscuda.studies.heads import replace_head
from rlscuda.studies.metrics import auc, paired, prunability
from rlscuda.studies.protocol import LADDER, Protocol, Split, Task
from rlscuda.studies.report import Study
from rlscuda.studies.runner import pretraining

__all__ = [
    "LADDER",
    "Protocol",
    "Split",
    "Study",
    "Task",
    "auc",
    "paired",
    "pretraining",
    "prunability",
    "replace_head",
]
