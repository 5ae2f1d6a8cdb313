"""What accuracy pruners leave, at equal FLOPs: ours, and torch-pruning's importances."""
