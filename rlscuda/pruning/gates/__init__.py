"""Bernoulli gates on residual branches: training decides which of them are worth their price."""
