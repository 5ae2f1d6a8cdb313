"""Heads of attention: where they lie in the weights, and the basis in which they are pruned."""
