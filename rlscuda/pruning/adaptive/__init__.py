"""Shares of channels and of layers that are learned: one penalty, one price, one list.

How a network is cut is not decided here, but in the folders beside this one.
"""
