"""Filters that learn sample by sample, and matrices that hold updates back.

Nothing here knows of networks or of training.
"""
