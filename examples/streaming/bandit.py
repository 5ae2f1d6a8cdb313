"""A contextual bandit: LinUCB (Li et al. 2010), ten arms of which each has a filter of its own.

An arm's reward is linear in the context, with noise. LinUCB pulls the arm whose mean plus 0.5
standard deviations is highest. Peer: epsilon-greedy with weights by SGD at three rates.
"""

import numpy as np
from pictures import OURS, PEER, SECOND, THIRD, draw, plot_option

from rlscuda import RLSFilterBank

ARMS, INPUTS, ROUNDS, NOISE = 10, 8, 5000, 0.5


def lin_ucb(contexts, rewards):
    """The arms pulled [ROUNDS]; one call a round looks at all filters, one updates its own."""
    arms, pulled = RLSFilterBank(ARMS, INPUTS), np.empty(ROUNDS, int)
    for t, x in enumerate(contexts):
        bound = arms.predict(x)[:, 0] + 0.5 * np.sqrt(arms.variance(x))
        pulled[t] = bound.argmax()
        arms.update(x, rewards[t, pulled[t : t + 1]], index=pulled[t : t + 1])
    return pulled


def greedy_sgd(contexts, rewards, rate, explore=0.02):
    """The arms pulled [ROUNDS] by epsilon-greedy."""
    rng, W, pulled = np.random.default_rng(1), np.zeros((ARMS, INPUTS)), np.empty(ROUNDS, int)
    for t, x in enumerate(contexts):
        k = pulled[t] = rng.integers(ARMS) if rng.random() < explore else (W @ x).argmax()
        W[k] += rate * (rewards[t, k] - W[k] @ x) * x
    return pulled


def main():
    """Plays the same rounds by each."""
    file, rng = plot_option(__doc__), np.random.default_rng(0)
    contexts = rng.standard_normal((ROUNDS, INPUTS))
    contexts /= np.linalg.norm(contexts, axis=1, keepdims=True)
    means = contexts @ rng.standard_normal((INPUTS, ARMS))
    rewards = means + NOISE * rng.standard_normal(means.shape)
    pulled = {"LinUCB": lin_ucb(contexts, rewards)}
    for rate in (0.2, 0.5, 1.0):
        pulled[f"SGD, rate {rate}"] = greedy_sgd(contexts, rewards, rate)
    lines = {}
    print("                  regret   best arm in the last 1,000 rounds")
    for (name, arms), color in zip(pulled.items(), (OURS, SECOND, PEER, THIRD), strict=True):
        regret = (means.max(1) - means[np.arange(ROUNDS), arms]).cumsum()
        right = (arms == means.argmax(1))[-1000:].mean()
        print(f"{name:16}{regret[-1]:8.0f} {right:12.0%}")
        lines[name] = (np.arange(ROUNDS), regret, color)
    if file:
        draw(file, [lines], "round", ["regret so far"])


if __name__ == "__main__":
    main()
