"""`rlscuda prune`: from the network of a finished run to a smaller one.

The pruning itself is `rlscuda.pruning`, the report of it `rlscuda.cli.report`.
"""
