"""Weights that jump once and then drift slowly, tracked by memories of different kinds.

16 inputs of unit power that are correlated, noise of 0.3. Peer: SGDRegressor.partial_fit of
scikit-learn, at a constant rate.
"""

import numpy as np
from pictures import OURS, PEER, SECOND, THIRD, draw, plot_option
from sklearn.linear_model import SGDRegressor

from rlscuda import RLSFilter

INPUTS, SAMPLES, JUMP, NOISE = 16, 6000, 2000, 0.3


def sgd_path(X, y, rate=0.02):
    """The weights of SGDRegressor after each sample [T, n]."""
    model = SGDRegressor(learning_rate="constant", eta0=rate, alpha=0, fit_intercept=False)
    return np.array(
        [model.partial_fit(X[t : t + 1], y[t : t + 1]).coef_.copy() for t in range(len(y))]
    )


def main():
    """Follows the weights by each."""
    file, rng = plot_option(__doc__), np.random.default_rng(0)
    X = rng.standard_normal((SAMPLES, 1)) + 0.5 * rng.standard_normal((SAMPLES, INPUTS))
    X /= X.std(0)
    steps = np.zeros((SAMPLES, INPUTS))
    steps[[0, JUMP]] = rng.standard_normal((2, INPUTS))
    steps[2 * JUMP :] = 0.005 * rng.standard_normal((SAMPLES - 2 * JUMP, INPUTS))
    true = steps.cumsum(0)
    y = (X * true).sum(1) + NOISE * rng.standard_normal(SAMPLES)
    filters = {
        "forgetting=0.99": RLSFilter(INPUTS, forgetting=0.99, initial_scale=100),
        "window=100": RLSFilter(INPUTS, window=100, initial_scale=100),
        "forgetting=1": RLSFilter(INPUTS, initial_scale=100),
    }
    paths = {name: f.run(X, y, history=True)[1][:, 0] for name, f in filters.items()}
    paths["SGDRegressor"] = sgd_path(X, y)
    lines = {}
    print("error of weights    steady   100 after the jump   in the drift")
    for (name, path), color in zip(paths.items(), (OURS, THIRD, SECOND, PEER), strict=True):
        error = np.linalg.norm(path - true, axis=1)
        places = slice(1000, JUMP), slice(JUMP + 100, JUMP + 110), slice(5000, None)
        values = [np.sqrt(np.square(error[place]).mean()) for place in places]
        print("{:16}{:10.3f} {:15.3f} {:18.3f}".format(name, *values))
        lines[name] = (np.arange(0, SAMPLES, 20), error[::20], color)
    if file:
        label = "sample (a jump at 2,000, a drift from 4,000 on)"
        draw(file, [lines], label, ["‖W − truth‖"], logarithmic=[0])


if __name__ == "__main__":
    main()
