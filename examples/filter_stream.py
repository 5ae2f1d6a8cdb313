"""A filter that follows a stream: unknown weights, met one noisy sample at a time, change halfway.

python examples/filter_stream.py
"""

import numpy as np

from rlscuda import RLSFilter

rng = np.random.default_rng(0)
X = rng.standard_normal((2000, 8))
before, after = rng.standard_normal((2, 8))
y = np.where(np.arange(2000) < 1000, X @ before, X @ after) + 0.1 * rng.standard_normal(2000)

remembers = RLSFilter(8)  # forgetting=1: least squares over everything so far
forgets = RLSFilter(8, forgetting=0.98)  # a memory of 1 / (1 - 0.98) = 50 samples
window = RLSFilter(8, window=50)  # of the last 50 samples exactly

print("error of the weights  forgetting=1  forgetting=0.98  window=50")
for t, (x, target) in enumerate(zip(X, y), 1):
    for f in (remembers, forgets, window):
        f.update(x, target)  # f.predict(x) before that is what the filter expects
    if t in (10, 100, 1000, 1050, 1100, 2000):
        truth = before if t <= 1000 else after
        errors = [np.linalg.norm(f.W[0] - truth) for f in (remembers, forgets, window)]
        print("after {:5} samples {:15.3f} {:16.3f} {:10.3f}".format(t, *errors))

# the same in one call, in C++: 2,000 predictions, each made before its target was seen
predictions = RLSFilter(8, forgetting=0.98).run(X, y)
error = np.square(predictions - y)[-500:].mean() ** 0.5
print(f"rms error of the last 500 predictions: {error:.3f}, of which noise 0.1")
