"""The kernels' machine code: taken apart, its instructions, its loops, the loops that matter."""
