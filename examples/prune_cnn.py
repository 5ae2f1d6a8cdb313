"""Half of a CNN's channels go, without any training; then training goes on, and an export ends it.

python examples/prune_cnn.py --out pruned.pt2
"""

import argparse
import copy

import torch
from train_digits import accuracy, network, splits, train

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner, export_program

METHODS = {
    "ours": {},  # by the matrices that training has kept
    "L1 magnitude": {"importance": "l1", "compensate": False},
    "random": {"importance": "random", "compensate": False},
}


def main():
    """Trains, prunes by three methods, trains ours on and exports it."""
    parser = argparse.ArgumentParser(description="Prunes a small CNN.")
    parser.add_argument("--out", default="pruned.pt2", help="the program of torch.export")
    out = parser.parse_args().out
    data, test = splits()
    torch.manual_seed(0)
    model = network()
    optimizer = RLSOptimizer(model)
    list(train(model, optimizer, *data, epochs=10))
    print(f"trained: {accuracy(model, *test):.1f} %")
    for name, how in METHODS.items():
        pruned, its = copy.deepcopy((model, optimizer))  # in one copy, so that they stay a pair
        report = RLSPruner(pruned, its, test[0][:1], ratio=0.5, **how).step()
        print(report, f"{name}: {accuracy(pruned, *test):.1f} %", sep="\n\n")
    RLSPruner(model, optimizer, test[0][:1], ratio=0.5).step()
    optimizer.restart()  # its schedule had ended: moments start anew, and the rate warms up
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.02
    list(train(model, optimizer, *data, epochs=2))
    print(f"ours, trained on for two epochs: {accuracy(model, *test):.1f} %")
    export_program(model, test[0][:2], out)
    again = torch.export.load(out).module()
    print(f"{out}: {accuracy(again, *test):.1f} %, by torch.export.load alone")


if __name__ == "__main__":
    main()
