"""
Forms, and mixed precision
==========================

:class:`~rlscuda.RLSOptimizer` has four forms. They differ in how a minibatch enters the inverse
autocorrelation matrix `P` of a layer's inputs, and in the step that is made of the gradient G and
`P`:

- ``"spectral"``, the default: the momentum, made orthogonal in the metric of `P`;
- ``"adaptive"``: G P, normalised row by row as Adam does element by element; cheapest on wide
  layers;
- ``"paper"``: the rule of Zhang et al. 2021, one mean row a minibatch and no momentum;
- ``"natural"``: G P with the matrix that has seen the minibatch, after a random sketch of it.

This page trains a small network on real digits with each, looks at their matrices, and then does
the same in bfloat16.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rlscuda import RLSOptimizer

digits = load_digits()  # 1,797 images of 8 x 8
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]


def fit(form, dtype=None, epochs=8, size=64):
    """The trained network, its optimizer, and the loss of every step."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, losses = RLSOptimizer(model, form=form), []
    steps = epochs * -(-len(train) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(size):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return model, optimizer, losses


@torch.no_grad()
def accuracy(model):
    """On the test digits, in percent."""
    return 100 * (model(x[test]).argmax(1) == y[test]).float().mean().item()


# %%
# Four forms at their defaults
# ----------------------------
# On the left the training losses. On the right what `P` has become: the inputs of the first
# linear layer have an autocorrelation matrix A; along each eigenvector v of A stands what `P`
# holds there, vᵀP v. The matrices of the spectral and the adaptive form are driven towards
# A^(−1/2), a line of slope −1/2, with a cap where inputs are weak. The mean of a minibatch tells
# the paper's form about little else than the strongest direction.

runs = {form: fit(form) for form in ("spectral", "adaptive", "paper", "natural")}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for (form, (model, optimizer, losses)), color in zip(runs.items(), ("C3", "C0", "C2", "C1")):
    print(f"{form:9} test accuracy {accuracy(model):.1f} %")
    left.plot(torch.tensor(losses).unfold(0, 10, 1).mean(1), color=color, label=form)
    with torch.no_grad():
        inputs = model[:4](x[train])
        A = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)  # a column for the bias
        A = A.T @ A / len(inputs)
        power, v = torch.linalg.eigh(A)
        P = optimizer.inverse_autocorrelation(model[4])
        held = torch.einsum("ij,ik,kj->j", v, P, v)
    seen = power > 1e-5
    right.loglog(power[seen], held[seen], ".", ms=4, color=color, label=form)
line = torch.tensor([0.1, 300.0])
right.loglog(line, line**-0.5, color="black", lw=1, label="A^(−1/2)")
left.set(yscale="log", xlabel="step", ylabel="training loss, mean of 10 steps")
right.set(xlabel="eigenvalue of A", ylabel="what P holds along its eigenvector")
for axis in (left, right):
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
plt.show()

# %%
# bfloat16
# --------
# Under :class:`torch.autocast` the forward and the gradients are in bfloat16. `P` is float32
# whatever the layers compute in, since its update subtracts what is nearly equal. On a GPU with
# float16, `torch.amp.GradScaler` goes around :meth:`~rlscuda.RLSOptimizer.step` as usual; a step
# that it skips leaves `P` untouched.

model, optimizer, losses = fit("spectral", torch.bfloat16)
print(f"float32  {accuracy(runs['spectral'][0]):.1f} %, loss {runs['spectral'][2][-1]:.3f}")
print(f"bfloat16 {accuracy(model):.1f} %, loss {losses[-1]:.3f}")
print("P is", optimizer.inverse_autocorrelation(model[4]).dtype)

# %%
# Two reports
# -----------
# :meth:`~rlscuda.RLSOptimizer.coverage` says which rule trains each layer, and what its `P`
# takes; :meth:`~rlscuda.RLSOptimizer.health` what has happened to it. Refused updates are of
# gradients or inputs that were not finite, resets of matrices that had to start anew: both should
# be 0. Their ``as_dict()`` goes to a logger.

print(optimizer.coverage())
print()
print(optimizer.health())
