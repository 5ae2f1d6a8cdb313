"""
Streams: an echo, a chaotic network, a bandit
=============================================

:class:`~rlscuda.RLSFilter` learns y ≈ W x from samples that come one by one, exactly as least
squares over all of them would, at O(n²) a sample. Three uses of it, each beside what is usually
written. The longer versions, beside other libraries, are in `examples/streaming`.
"""

import matplotlib.pyplot as plt
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from rlscuda import RLSFilter, RLSFilterBank


class FiveLines:
    """Recursive least squares as textbooks write it."""

    def __init__(self, n, forgetting, scale):
        self.P, self.w, self.forgetting = scale * np.eye(n), np.zeros(n), forgetting

    def update(self, x, y):
        """The prediction, after which the sample is learnt."""
        prediction = self.w @ x
        u = self.P @ x
        h = self.forgetting + x @ u
        self.w += (y - prediction) * u / h
        self.P = (self.P - np.outer(u, u) / h) / self.forgetting
        return prediction


def nlms(X, y, rate=0.5):
    """Predictions of normalised least mean squares, which keeps no matrix [T]."""
    w, predictions = np.zeros(X.shape[1]), np.empty(len(y))
    for t, (x, target) in enumerate(zip(X, y)):
        predictions[t] = w @ x
        w += rate * (target - predictions[t]) * x / (1e-3 + x @ x)
    return predictions


# %%
# An echo canceller
# -----------------
# What the far end says comes back through a room into the microphone, and is to be taken out of
# it. The far end speaks for a second and a half, is then put on hold, which sends a steady tone,
# and speaks again. ``run`` takes the whole series, as a view of delayed samples without a copy.

rate, taps = 8000, 32
rng = np.random.default_rng(0)
time = np.arange(4 * rate) / rate
colour = 0.9 ** np.arange(100) * np.cos(0.5 * np.arange(100))
voice = rng.standard_normal(len(time)) * abs(np.sin(6 * time))
voice = np.convolve(voice, colour)[: len(time)]
tone = np.sin(2 * np.pi * 425 * time)
far = np.where((time > 1.5) & (time < 3), tone, voice / voice.std())
X = sliding_window_view(np.concatenate([np.zeros(taps - 1), far]), taps)[:, ::-1]
echo = X @ (rng.standard_normal(taps) * np.exp(-np.arange(taps) / 8))
microphone = echo + 0.01 * echo.std() * rng.standard_normal(len(X))

textbook = FiveLines(taps, 0.998, 100.0)
estimates = {
    "NLMS": nlms(X, microphone),
    "textbook RLS": np.array([textbook.update(x, y) for x, y in zip(X, microphone)]),
    "RLSFilter": RLSFilter(taps, forgetting=0.998, initial_scale=100.0).run(X, microphone),
}

# %%
# The picture shows how much weaker the echo has become, in tenths of a second. Both filters with
# a matrix learn coloured speech and the tone deeper than NLMS. But a tone excites two directions
# only; in all others the textbook's matrix grows as λ⁻ᵗ, and when speech is back it answers with
# an error. The ridge of :class:`~rlscuda.RLSFilter` bounds that.

figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
for (name, estimate), color in zip(estimates.items(), ("C7", "C0", "C3")):
    width = 4 if name == "textbook RLS" else 1.5  # to be seen beneath the line that agrees with it
    power, rest = (np.square(e).reshape(-1, 800).mean(1) for e in (echo, echo - estimate))
    decibels = 10 * np.log10(power / rest)
    axis.plot(
        time[400::800], decibels, color=color, lw=width, alpha=0.5 if width == 4 else 1, label=name
    )
axis.axvspan(1.5, 3, color="C8", alpha=0.15, label="tone")
axis.set(xlabel="time, s", ylabel="echo return loss enhancement, dB")
axis.legend(fontsize=8)
axis.grid(alpha=0.3)
plt.show()

# %%
# FORCE learning
# --------------
# A chaotic network whose read-out is fed back learns to sing (Sussillo and Abbott 2009). The
# read-out is learnt after each step, one :meth:`~rlscuda.RLSFilter.update` a step, and then left
# alone.

neurons, steps, alone = 200, 5000, 1200
J = rng.standard_normal((neurons, neurons)) * (rng.random((neurons, neurons)) < 0.1)
J *= 1.3 / np.sqrt(0.1 * neurons)
feedback = 2 * rng.random(neurons) - 1
beat = 0.1 * np.arange(steps + alone)
target = 0.4 * (np.sin(2 * np.pi * beat / 30) + 0.5 * np.sin(4 * np.pi * beat / 30))
readout = RLSFilter(neurons)
state, z, output = 0.5 * rng.standard_normal(neurons), 0.0, np.empty(len(beat))
for t, wanted in enumerate(target):
    state += 0.1 * (-state + J @ np.tanh(state) + feedback * z)
    rates = np.tanh(state)
    if t < steps:
        readout.update(rates, wanted)
    output[t] = z = float(readout.W[0] @ rates)

figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
shown = slice(steps - 600, None)
axis.plot(beat[shown], target[shown], color="C0", lw=4, alpha=0.4, label="target")
axis.plot(beat[shown], output[shown], color="C3", lw=1.2, label="output")
axis.axvline(beat[steps], color="black", lw=1, ls="--", label="from here on alone")
axis.set(xlabel="time, in time constants of a neuron", ylabel="read-out", ylim=(-1, 1.4))
axis.legend(fontsize=8, loc="upper right")
axis.grid(alpha=0.3)
plt.show()
print(f"rms error alone: {np.sqrt(np.square(output - target)[steps:].mean()):.4f}")

# %%
# A linear bandit
# ---------------
# Ten arms, each with a reward that is linear in the context, plus noise. LinUCB (Li et al. 2010)
# pulls the arm whose mean plus half a standard deviation is highest:
# :class:`~rlscuda.RLSFilterBank` holds a filter for each arm, ``variance`` is the width of its
# bound, and one call updates the arm that was pulled. Beside it, greedy choices by SGD, at the
# best of three rates.

arms, inputs, rounds = 10, 8, 3000
contexts = rng.standard_normal((rounds, inputs))
contexts /= np.linalg.norm(contexts, axis=1, keepdims=True)
means = contexts @ rng.standard_normal((inputs, arms))
rewards = means + 0.5 * rng.standard_normal(means.shape)
bank, pulled = RLSFilterBank(arms, inputs), np.empty(rounds, int)
for t, x in enumerate(contexts):
    pulled[t] = (bank.predict(x)[:, 0] + 0.5 * np.sqrt(bank.variance(x))).argmax()
    bank.update(x, rewards[t, pulled[t : t + 1]], index=pulled[t : t + 1])


def greedy(rate, explore=0.02):
    """The arms pulled by epsilon-greedy choices and SGD [rounds]."""
    W, chosen = np.zeros((arms, inputs)), np.empty(rounds, int)
    for t, x in enumerate(contexts):
        k = chosen[t] = rng.integers(arms) if rng.random() < explore else (W @ x).argmax()
        W[k] += rate * (rewards[t, k] - W[k] @ x) * x
    return chosen


def regret(chosen):
    """What the best arm would have given more, so far [rounds]."""
    return (means.max(1) - means[np.arange(rounds), chosen]).cumsum()


best = min((regret(greedy(rate)) for rate in (0.2, 0.5, 1.0)), key=lambda path: path[-1])
figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
axis.plot(best, color="C7", label="epsilon-greedy, SGD")
axis.plot(regret(pulled), color="C3", label="LinUCB, RLSFilterBank")
axis.set(xlabel="round", ylabel="regret so far")
axis.legend(fontsize=8)
axis.grid(alpha=0.3)
plt.show()
