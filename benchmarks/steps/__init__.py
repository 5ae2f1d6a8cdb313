"""Whole steps of a network, of training, of the optimizer alone, of pruning; and a long run."""
