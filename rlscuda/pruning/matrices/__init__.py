"""Where inverse autocorrelation matrices come from: the optimizer, a sketch, a calibration.

Nothing here says what they are used for.
"""
