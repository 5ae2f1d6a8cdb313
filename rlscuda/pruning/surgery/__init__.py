"""The cut: what is kept of every tensor, and a model and optimizers that follow, or nothing.

Nothing here chooses.
"""
