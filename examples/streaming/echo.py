"""Acoustic echo canceller: takes the far end's voice out of the microphone's signal.

A line of 64 delayed samples at 8 kHz. The far end speaks, is put on hold, which sends a steady
tone, and speaks again; later the path of the echo changes at once. Peers: NLMS and RLS of padasip.
"""

import numpy as np
import padasip
from numpy.lib.stride_tricks import sliding_window_view
from pictures import OURS, PEER, SECOND, draw, plot_option

from rlscuda import RLSFilter

RATE, TAPS, FORGETTING = 8000, 64, 0.999
SPEECH, HOLD, BACK, CHANGED = slice(1, 2), slice(3, 4), slice(4.0, 4.1), slice(5.0, 5.5)  # seconds


def far_end(rng):
    """Six seconds: coloured noise that swells and fades, and a tone from 2 s to 4 s."""
    time = np.arange(6 * RATE) / RATE
    colour = 0.9 ** np.arange(100) * np.cos(0.5 * np.arange(100))
    far = np.convolve(rng.standard_normal(len(time)) * abs(np.sin(6 * time)), colour)[: len(time)]
    return np.where(abs(time - 3) < 1, np.sin(2 * np.pi * 425 * time), far / far.std())


def loss(echo, rest, seconds):
    """Echo return loss enhancement in dB: how much weaker the echo is than before."""
    part = slice(int(seconds.start * RATE), int(seconds.stop * RATE))
    return 10 * np.log10(np.square(echo[part]).mean() / np.square(rest[part]).mean())


def main():
    """Cancels one call by each filter."""
    file, rng = plot_option(__doc__), np.random.default_rng(0)
    far = np.concatenate([np.zeros(TAPS - 1), far_end(rng)])
    X = sliding_window_view(far, TAPS)[:, ::-1]  # a tapped delay line, without a copy
    paths = rng.standard_normal((2, TAPS)) * np.exp(-np.arange(TAPS) / 12)
    echo = np.where(np.arange(len(X)) < 5 * RATE, X @ paths[0], X @ paths[1])
    microphone = echo + 0.01 * echo.std() * rng.standard_normal(len(X))
    rls = padasip.filters.FilterRLS(TAPS, mu=FORGETTING, eps=0.01, w="zeros")
    estimates = {
        "padasip NLMS": padasip.filters.FilterNLMS(TAPS, mu=0.5, w="zeros").run(microphone, X)[0],
        "padasip RLS": rls.run(microphone, X)[0],
        "RLSFilter": RLSFilter(TAPS, forgetting=FORGETTING, initial_scale=100).run(X, microphone),
    }
    print("ERLE in dB     speech    tone  0.1 s after it  0.5 s after a change")
    for name, estimate in estimates.items():
        values = [loss(echo, echo - estimate, part) for part in (SPEECH, HOLD, BACK, CHANGED)]
        print("{:14}{:7.1f} {:7.1f} {:15.1f} {:22.1f}".format(name, *values))
    if file:
        starts = np.arange(0, 6, 0.1)
        lines = {
            name: (starts, [loss(echo, echo - e, slice(s, s + 0.1)) for s in starts], color)
            for (name, e), color in zip(estimates.items(), (SECOND, PEER, OURS), strict=True)
        }
        draw(file, [lines], "time, s (a tone from 2 to 4, a new path at 5)", ["ERLE, dB"])


if __name__ == "__main__":
    main()
