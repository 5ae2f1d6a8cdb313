"""The parts of `rlscuda.optimizer`: layers, what a forward leaves, the step, its state.

Nothing here prunes; what a cut leaves of a layer's state is here, since the optimizer owns it.
"""
