"""FORCE learning: a chaotic network of 300 neurons whose read-out is fed back learns two sines.

The read-out is learnt after each step (Sussillo and Abbott 2009), then runs alone for 1,000 steps.
Peer: five lines of NumPy, the plain form.
"""

import time

import numpy as np
from five_lines import FiveLines
from pictures import OURS, PEER, draw, plot_option

from rlscuda import RLSFilter

NEURONS, STEPS, ALONE, DT, FORGETTING = 300, 10_000, 1000, 0.1, 0.999


def trained(readout, target):
    """What the network puts out [T], and the seconds that its read-out took to learn."""
    rng, spent = np.random.default_rng(0), 0.0
    J = rng.standard_normal((NEURONS, NEURONS)) * (rng.random((NEURONS, NEURONS)) < 0.1)
    J *= 1.3 / np.sqrt(0.1 * NEURONS)
    back = 2 * rng.random(NEURONS) - 1
    state, z, outputs = 0.5 * rng.standard_normal(NEURONS), 0.0, np.empty(len(target))
    for t, wanted in enumerate(target):
        state += DT * (-state + J @ np.tanh(state) + back * z)
        rates = np.tanh(state)
        if t < STEPS:
            start = time.perf_counter()
            readout.update(rates, wanted)
            spent += time.perf_counter() - start
        outputs[t] = z = float(readout.W[0] @ rates)
    return outputs, spent


def main():
    """Trains the network by both."""
    file = plot_option(__doc__)
    seconds = np.arange(STEPS + ALONE) * DT
    target = np.sin(2 * np.pi * seconds / 30) + 0.5 * np.sin(4 * np.pi * seconds / 30)
    target *= 0.375 / target.std()
    last = slice(STEPS - 600, None)
    lines, errors = {"target": (seconds[last], target[last], PEER)}, {}
    kinds = {"RLSFilter": RLSFilter, "NumPy": FiveLines}
    print("           rms error alone   µs a sample")
    for (name, kind), color in zip(kinds.items(), (OURS, PEER), strict=True):
        outputs, spent = trained(kind(NEURONS, forgetting=FORGETTING), target)
        wrong = np.square(outputs - target)
        print(f"{name:10}{np.sqrt(wrong[STEPS:].mean()):16.4f} {spent / STEPS * 1e6:13.1f}")
        errors[name] = (seconds[::200], np.sqrt(wrong.reshape(-1, 200).mean(1)), color)
        if name == "RLSFilter":
            lines[name] = (seconds[last], outputs[last], OURS)
    if file:
        label = f"time, in time constants of a neuron (learns until {STEPS * DT:.0f}, then alone)"
        draw(file, [errors, lines], label, ["rms error of 200 steps", "output"], logarithmic=[0])


if __name__ == "__main__":
    main()
