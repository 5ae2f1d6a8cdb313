"""What the machine code of every CUDA kernel says about its speed, without a GPU.

Figures are read or computed, none is measured: the times are predictions (`model`).
"""
