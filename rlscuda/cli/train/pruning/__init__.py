"""Pruning that is part of a training: in rounds, by a learned price, or by gates."""
