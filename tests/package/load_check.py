"""Checks an installed build by itself: the operators are registered, with their schemas, and run.

Run with the interpreter to check: python tests/package/load_check.py
"""

import torch

import rlscuda
import rlscuda.functional as RF

COMPOSED = {"rls_ridge_"}  # of other operators
EXPECTED = {*RF.__all__, "weight_step_", "adaptive_weight_step_", "nonfinite", "factors_agree"}
EXPECTED = EXPECTED - COMPOSED
EXPECTED |= {"foreach_complete_products_", "foreach_nesterov_", "foreach_rls_update_"}
EXPECTED |= {"foreach_spectral_direction_", "foreach_spectral_root_", "foreach_weight_step_"}
CPU_ONLY = {"factors_agree", "foreach_spectral_direction_"}  # a GPU has its products by a library


def main() -> None:
    print(rlscuda.build_info())
    for name in sorted(EXPECTED):
        schema = getattr(torch.ops.rlscuda, name).default._schema
        keys = [k for k in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(
            f"rlscuda::{name}", k)]  # fmt: skip
        assert "CPU" in keys, f"{name} has no CPU kernel"
        on_gpu = rlscuda.build_info()["cuda"] and name not in CPU_ONLY
        assert not on_gpu or "CUDA" in keys, f"{name} has no CUDA kernel"
        print(f"{','.join(keys):9} {schema}")
    P = torch.eye(2)
    _, h = RF.rls_update_(P, torch.tensor([1.0, 2.0]), forgetting=0.5)
    assert h.item() == 5.5, h
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    optimizer = rlscuda.RLSOptimizer(model)
    model(torch.randn(4, 1, 4, 4)).square().mean().backward()
    optimizer.step()
    assert torch.isfinite(model[2].weight).all()
    print("loads and runs in torch", torch.__version__)


if __name__ == "__main__":
    main()
