"""PyTorch's own harness for optimizers, on plain parameters: the fallback rule trains them all."""

import copy
import gc
import io

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

from rlscuda import RLSOptimizer

# importing that harness freezes torch.backends for the whole process, and so for all other tests
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True


def inputs(device, dtype=None):
    return [
        OptimizerInput(None, {}, "default"),
        OptimizerInput(None, {"lr": 0.01}, "non-default lr"),
        OptimizerInput(None, {"lr": torch.tensor(0.001)}, "tensor lr"),
        OptimizerInput(None, {"lr": 0.01, "weight_decay": 0.1}, "weight decay"),
        OptimizerInput(None, {"form": "paper", "fallback_lr": 0.02}, "paper form"),
        OptimizerInput(None, {"form": "natural", "momentum": 0.5, "rank": 3}, "natural form"),
        OptimizerInput(None, {"fallback": "sgd", "fallback_lr": 1e-3}, "sgd"),
        OptimizerInput(None, {"fallback": torch.optim.RMSprop}, "a callable"),
    ]


def wrong_inputs(device, dtype):
    def wrong(regex, **kwargs):  # params=None: an option is checked before they are touched
        return ErrorOptimizerInput(
            OptimizerInput(None, kwargs), error_type=ValueError, error_regex=regex
        )

    return get_error_inputs_for_all_optims(device, dtype) + [
        wrong("lr must be >= 0 and finite, got -0.1", lr=-0.1),
        wrong("lr must be >= 0 and finite, got nan", lr=float("nan")),
        wrong(
            "form must be spectral | adaptive | paper | natural, got 'x'".replace("|", r"\|"),
            form="x",
        ),
        wrong("momentum must be in .0, 1., got 1.0", momentum=1.0),
        wrong("fallback must be adamw", fallback="adamax"),
    ]


INFO = OptimizerInfo(
    RLSOptimizer,
    optim_inputs_func=inputs,
    optim_error_inputs_func=wrong_inputs,
    scheduler_inputs=(
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
        [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
        [lambda opt: CosineAnnealingLR(opt, 50), lambda opt: ReduceLROnPlateau(opt)],
    ),
    supported_impls=(),
)


def problem(device, dtype, contiguous=True):
    """A weight, a bias, and the loss of a linear model of them as a closure's maker."""
    weight = torch.randn(10, 5, device=device, dtype=dtype)
    bias = torch.randn(10, device=device, dtype=dtype)
    if not contiguous:
        weight, bias = (torch.stack([p, p], -1)[..., 0] for p in (weight, bias))
    x = torch.randn(5, device=device, dtype=dtype)

    def closure_of(optimizer, weight, bias):
        def closure():
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).square().sum()
            loss.backward()
            return loss

        return closure

    return Parameter(weight), Parameter(bias), closure_of


def advance(schedulers, loss):
    for scheduler in schedulers:
        scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


GROUPS = {
    "plain": lambda weight, bias: [weight, bias],
    "own_lr": lambda weight, bias: [{"params": [weight]}, {"params": [bias], "lr": 0.01}],
    "single": lambda weight, bias: [{"params": bias, "lr": 0.01}],
    "named": lambda weight, bias: [("weight", weight), ("bias", bias)],
    "generator": lambda weight, bias: (p for p in (weight, bias)),
}


def setup_module():
    """So that not everything is looked through for a module that holds the parameters."""
    gc.collect()
    gc.freeze()


def teardown_module():
    gc.unfreeze()


class TestRLSOptimizer(TestCase):
    @optims([INFO], dtypes=[torch.float32])
    def test_errors(self, device, dtype, optim_info):
        for wrong in optim_info.optim_error_inputs_func(device, dtype):
            self.assertIs(wrong.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            given = wrong.optimizer_error_input
            check = self.assertRaisesRegex
            if issubclass(wrong.error_type, Warning):
                check = self.assertWarnsRegex
            with check(wrong.error_type, wrong.error_regex):
                optim_info.optim_cls(given.params, **given.kwargs)

    @parametrize("groups", list(GROUPS))
    @parametrize("contiguous", [True, False])
    @optims([INFO], dtypes=[torch.float32, torch.float64])
    def test_goes_down(self, device, dtype, optim_info, contiguous, groups):
        for given in optim_info.optim_inputs_func(device):
            for makers in ([], *optim_info.scheduler_inputs):
                weight, bias, closure_of = problem(device, dtype, contiguous)
                optimizer = optim_info.optim_cls(GROUPS[groups](weight, bias), **given.kwargs)
                schedulers = [make(optimizer) for make in makers]
                closure = closure_of(optimizer, weight, bias)
                first = closure().item()
                for _ in range(10):
                    advance(schedulers, optimizer.step(closure).item())
                self.assertLess(closure().item(), first)
                self.assertIn("lr", repr(optimizer))

    @parametrize("shape", [(), (1,)])
    @optims([INFO], dtypes=[torch.float32])
    def test_tensor_lr_is_the_number(self, device, dtype, optim_info, shape):
        for given in optim_info.optim_inputs_func(device):
            weight, bias, closure_of = problem(device, dtype)
            twin = Parameter(weight.detach().clone()), Parameter(bias.detach().clone())
            kwargs = {**given.kwargs, "lr": 0.01}
            first = optim_info.optim_cls([weight, bias], **kwargs)
            second = optim_info.optim_cls(twin, **{**kwargs, "lr": torch.full(shape, 0.01)})
            schedulers = [StepLR(first, 2, 0.5), StepLR(second, 2, 0.5)]
            for _ in range(5):
                first.step(closure_of(first, weight, bias))
                second.step(closure_of(second, *twin))
                advance(schedulers, None)
            self.assertEqual((weight, bias), twin)
            self.assertIsInstance(second.param_groups[0]["lr"], torch.Tensor)

    @optims([INFO], dtypes=[torch.complex64])
    def test_complex_parameter_is_its_real_view(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            p = torch.randn(4, 3, device=device, dtype=dtype, requires_grad=True)
            view = torch.view_as_real(p).detach().clone().requires_grad_()
            first, second = (optim_info.optim_cls([q], **given.kwargs) for q in (p, view))
            for _ in range(3):
                p.grad = torch.randn_like(p)
                view.grad = torch.view_as_real(p.grad)
                first.step()
                second.step()
            self.assertEqual(torch.view_as_real(p), view)

    @parametrize("grads", ["none", "zero", "empty"])
    @optims([INFO], dtypes=[torch.float32])
    def test_step_is_a_noop(self, device, dtype, optim_info, grads):
        for given in optim_info.optim_inputs_func(device):
            kwargs = {k: v for k, v in given.kwargs.items() if k != "weight_decay"}
            shape = (0, 5) if grads == "empty" else (10, 5)
            p = Parameter(torch.randn(shape, device=device, dtype=dtype))
            before = p.detach().clone()
            optimizer = optim_info.optim_cls([p], **kwargs)
            if grads != "none":
                p.grad = torch.zeros_like(p)
            for _ in range(2):
                optimizer.step()
            self.assertEqual(before, p)
            self.assertEqual(bool(optimizer.state), grads != "none")

    @optims([INFO], dtypes=[torch.float32])
    def test_gradients_are_left_alone(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device):
            weight, bias, closure_of = problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
            closure_of(optimizer, weight, bias)()
            grads = [p.grad for p in (weight, bias)]
            before = [(g.clone(), g._version) for g in grads]
            optimizer.step()
            self.assertEqual(before, [(g, g._version) for g in grads])
            self.assertTrue(weight.grad is grads[0] and bias.grad is grads[1])

    @parametrize("through", ["dict", "file", "pickle", "deepcopy"])
    @parametrize("groups", ["plain", "own_lr", "named"])
    @optims([INFO], dtypes=[torch.float32])
    def test_state_goes_on_elsewhere(self, device, dtype, optim_info, groups, through):
        for given in optim_info.optim_inputs_func(device):
            weight, bias, closure_of = problem(device, dtype)
            optimizer = optim_info.optim_cls(GROUPS[groups](weight, bias), **given.kwargs)
            for _ in range(3):
                optimizer.step(closure_of(optimizer, weight, bias))
            if through == "deepcopy":
                *twin, other = copy.deepcopy((weight, bias, optimizer))
                public = [{k for k in vars(o) if k[0] != "_"} for o in (optimizer, other)]
                self.assertEqual(*public)
            elif through == "pickle":
                buffer = io.BytesIO()
                torch.save((weight, bias, optimizer), buffer)
                buffer.seek(0)
                *twin, other = torch.load(buffer, weights_only=False)
            else:
                twin = [Parameter(p.detach().clone()) for p in (weight, bias)]
                other = optim_info.optim_cls(GROUPS[groups](*twin), **given.kwargs)
                state = copy.deepcopy(optimizer.state_dict())
                if through == "file":
                    buffer = io.BytesIO()
                    torch.save(state, buffer)
                    buffer.seek(0)
                    state = torch.load(buffer, weights_only=True)
                other.load_state_dict(state)
                self.assertEqual(state, optimizer.state_dict())
            for _ in range(3):
                optimizer.step(closure_of(optimizer, weight, bias))
                other.step(closure_of(other, *twin))
            self.assertEqual([weight, bias], twin, rtol=0, atol=0)
            self.assertEqual(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)

    @optims([INFO], dtypes=[torch.float32])
    def test_hooks_run_in_order(self, device, dtype, optim_info):
        weight, bias, closure_of = problem(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias])
        seen = []

        def note(name, result=None):
            return lambda of, *_: (seen.append(name) if of is optimizer else None, result)[1]

        optimizer.register_step_pre_hook(note("pre"))
        optimizer.register_step_post_hook(note("post"))
        everywhere = [
            register_optimizer_step_pre_hook(note("all pre")),
            register_optimizer_step_post_hook(note("all post")),
        ]
        try:
            closure_of(optimizer, weight, bias)()
            optimizer.step()
        finally:
            for handle in everywhere:
                handle.remove()
        self.assertEqual(seen, ["all pre", "pre", "post", "all post"])

        seen.clear()
        optimizer.register_state_dict_pre_hook(note("save pre 2"))
        optimizer.register_state_dict_pre_hook(note("save pre 1"), prepend=True)
        optimizer.register_state_dict_post_hook(note("save post 2"))
        optimizer.register_state_dict_post_hook(note("save post 1"), prepend=True)
        optimizer.register_load_state_dict_pre_hook(note("load pre 2"))
        optimizer.register_load_state_dict_pre_hook(note("load pre 1"), prepend=True)
        optimizer.register_load_state_dict_post_hook(note("load post 2"))
        optimizer.register_load_state_dict_post_hook(note("load post 1"), prepend=True)
        optimizer.load_state_dict(optimizer.state_dict())
        self.assertEqual(
            seen, [f"{w} {k}" for w in ("save pre", "save post", "load pre", "load post")
                   for k in (1, 2)],
        )  # fmt: skip
        state = optimizer.state_dict()
        optimizer.register_state_dict_post_hook(note("replaced", {**state, "extra": 1}))
        self.assertEqual(optimizer.state_dict()["extra"], 1)


instantiate_device_type_tests(TestRLSOptimizer, globals(), only_for="cpu")
