"""What is slow or noisy to measure: speed, memory, and how well networks learn and are pruned."""
