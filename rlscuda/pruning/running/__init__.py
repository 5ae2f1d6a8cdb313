"""Running a model without a trace in it: calls, copies, measurements, statistics of batch norms.

Nothing here knows of pruning but through a copy that was pruned.
"""
