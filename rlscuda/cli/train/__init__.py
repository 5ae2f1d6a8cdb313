"""`rlscuda train`: its options, its models and optimizers, the loop, and the folder of a run.

What prunes a network as it trains is here (`rounds`); the report of it is in `rlscuda.cli.report`.
"""
