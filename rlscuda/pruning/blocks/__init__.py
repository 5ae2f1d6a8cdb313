"""Whole residual branches: found in the dataflow, proven on a copy, removed or replaced by a map.

Channels are not looked at here.
"""
