"""One step of all layers: the updates of P, the products or directions, the weights.

Nothing here knows of hooks, parameter groups' edits or files.
"""
