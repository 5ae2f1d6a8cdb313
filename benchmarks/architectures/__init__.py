"""What of the architectures that people have can be pruned: ours, and torch-pruning."""
