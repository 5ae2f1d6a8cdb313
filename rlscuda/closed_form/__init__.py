"""The algebra of pruning: what removing columns costs, and what makes up for it.

On tensors alone: nothing here knows of layers, models or optimizers, and nothing is trained.
"""
