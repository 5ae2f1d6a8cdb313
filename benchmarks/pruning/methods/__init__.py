"""What our pruner is compared with."""
