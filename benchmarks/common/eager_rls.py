"""Recursive least squares in plain eager PyTorch: the baseline and oracle of the benchmarks.

``EagerRLS`` follows the equations of the paper, natural and adaptive forms literally, with the
best formulation that eager PyTorch offers for each of them (a rank-1 update is one ``mv`` and one
in-place ``addr_``, the mean patch is the patch of the mean image, the random-sign sketch is the
weight gradient of a convolution). It covers ``Linear`` and zero-padded ``Conv2d`` with groups = 1;
all other parameters go to AdamW or SGD. It shares no code with ``rlscuda``, so either can check
the other.

Symbols: X input rows [N, n], S summary [r, n], W weight with its bias as last column [c, n],
G its gradient, P inverse autocorrelation [n, n].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


class EagerRLS(torch.optim.Optimizer):
    """Train the Linear and Conv2d layers of ``model`` by recursive least squares.

    Args:
        model: The network; its layers get a forward hook that stages their input summary.
        form: ``paper`` (step G P_old / h), ``natural`` (step G P_new) or ``adaptive``.
        lr: Gradient scaling factor η.
        gain: κ, the weight of a new observation; the adaptive form uses max(gain, 1 / (t + 1)).
        forgetting: λ in (0, 1]; the adaptive form takes 1.
        rank: Number r of summary rows a step; by default 16 for the adaptive form, else 1.
        summary: ``mean``, ``sketch`` or ``sample``; by default ``sample`` for the adaptive form.
        momentum: α, or β₁ of the adaptive form.
        beta2: β₂ of the squared row norm (adaptive form).
        weight_decay: Decoupled: W ← (1 - lr · weight_decay) W.
        shrinkage: μ of P ← (1 - μ) P + μ P₀.
        drift: δ of P ← (1 - κδ) P + κ I (adaptive form).
        trust_ratio: τ of ‖ΔW‖ ≤ τ (1 - α) ‖W‖, where W is not 0 (paper and natural form).
        initial_scale: P₀ = initial_scale · I.
        fallback: ``adamw`` or ``sgd``, the rule for all other parameters.
        fallback_lr: Learning rate of that rule, by default 0.1 · lr.
        seed: Seed of the random summaries.

    Raises:
        ValueError: If ``form``, ``summary`` or ``fallback`` is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        form: str = "adaptive",
        lr: float = 0.1,
        gain: float = 0.01,
        forgetting: float = 1.0,
        rank: int | None = None,
        summary: str | None = None,
        momentum: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 0.05,
        shrinkage: float = 0.0,
        drift: float = 0.3,
        trust_ratio: float = 0.1,
        initial_scale: float = 1.0,
        fallback: str = "adamw",
        fallback_lr: float | None = None,
        seed: int = 0,
    ):
        summary = summary or ("sample" if form == "adaptive" else "mean")
        for name, value, known in (
            ("form", form, ("paper", "natural", "adaptive")),
            ("summary", summary, ("mean", "sketch", "sample")),
            ("fallback", fallback, ("adamw", "sgd")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        self.form, self.summary, self.forgetting, self.gain = form, summary, forgetting, gain
        self.rank = rank or (16 if form == "adaptive" else 1)
        self.momentum, self.beta2, self.weight_decay = momentum, beta2, weight_decay
        self.shrinkage = shrinkage
        self.drift, self.initial_scale = drift, initial_scale
        self.longest = trust_ratio * (1 - momentum)
        self.generator = torch.Generator().manual_seed(seed)
        self.layers = [m for m in model.modules() if _covered(m)]
        self.staged: dict[nn.Module, Tensor] = {}
        own = [p for m in self.layers for p in (m.weight, m.bias) if p is not None]
        taken = set(own)
        others = [p for p in model.parameters() if p not in taken]
        groups = [{"params": own, "lr": lr}]
        self.inner = None
        if others:
            fallback_lr = 0.1 * lr if fallback_lr is None else fallback_lr
            groups.append({"params": others, "lr": fallback_lr})
            rule = torch.optim.AdamW if fallback == "adamw" else torch.optim.SGD
            extra = {"weight_decay": 0.0} if fallback == "adamw" else {"momentum": 0.9}
            self.inner = rule(others, lr=fallback_lr, **extra)
        super().__init__(groups, {"lr": lr})
        for m in self.layers:
            m.register_forward_pre_hook(self._stage)

    def _stage(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.staged[layer] = self.summarise(layer, inputs[0])

    def summarise(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the summary S [r, n] of the layer's input rows, bias column included."""
        rows = _conv_rows if isinstance(layer, nn.Conv2d) else _linear_rows
        s, ones = rows(layer, x, self.summary, self.rank, self.generator)
        return s if layer.bias is None else torch.cat((s, ones), 1)

    @torch.no_grad()
    def step(self, closure=None):
        """Update P from the staged summaries, then the weights from their gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lr = self.param_groups[0]["lr"]
        for layer in self.layers:
            if layer.weight.grad is not None and layer in self.staged:
                self._step_layer(layer, self.staged.pop(layer), lr)
        if self.inner is not None:
            self.inner.param_groups[0]["lr"] = self.param_groups[1]["lr"]
            self.inner.step()
        return loss

    def _step_layer(self, layer: nn.Module, s: Tensor, lr: float) -> None:
        w, b, state = layer.weight, layer.bias, self.state[layer.weight]
        g = w.grad.flatten(1)
        if b is not None:
            g = torch.cat((g, b.grad[:, None]), 1)
        if not state:
            n = g.shape[1]
            state["P"] = torch.eye(n, dtype=w.dtype, device=w.device).mul_(self.initial_scale)
            state["M"] = torch.zeros_like(g)
            state["t"] = 0
        if self.form == "adaptive":
            # While its gain is large P is close to a multiple of I, and steps along the mean input
            # kill ReLUs: the step grows as the gain falls.
            kappa = max(self.gain, 1 / (state["t"] + 1))
            lr *= self.gain / kappa
            delta = self._adaptive(state, s, g, lr, kappa)
        else:
            size = w.norm() if b is None else torch.hypot(w.norm(), b.norm())
            delta = self._plain(state, s, g, lr, size)
        state["t"] += 1
        decay = 1 - lr * self.weight_decay
        n = w[0].numel()
        w.mul_(decay).add_(delta[:, :n].view_as(w))
        if b is not None:
            b.mul_(decay).add_(delta[:, n])

    def _plain(self, state: dict, s: Tensor, g: Tensor, lr: float, size: Tensor) -> Tensor:
        """Paper and natural form: Ψ ← αΨ + ΔW, ΔW short beside W's `size`; returns Ψ."""
        p, keep = state["P"], 1 - self.shrinkage
        step = g @ p if self.form == "paper" else None
        h = rls_update(p, s, self.gain, self.forgetting, keep, self.shrinkage * self.initial_scale)
        step = g @ p if step is None else step.div_(h)
        part = (self.longest * size / (lr * step.norm())).clamp(max=1)
        step.mul_(torch.where(size > 0, part, 1))
        return state["M"].mul_(self.momentum).add_(step, alpha=-lr)

    def _adaptive(self, state: dict, s: Tensor, g: Tensor, lr: float, kappa: float) -> Tensor:
        """Adaptive form; returns the change of the weights without decay."""
        t, p, m = state["t"], state["P"], state["M"]
        square = s.square().mean()
        if t == 0:
            state["scale"] = torch.zeros_like(square)
            state["v"] = torch.zeros_like(g[:, 0])
        scale = state["scale"].lerp_(square, kappa)
        s = s * scale.clamp(min=torch.finfo(s.dtype).tiny).rsqrt()
        rls_update(p, s, kappa, 1.0, 1 - kappa * self.drift, kappa)
        d = g @ p
        v = state["v"].mul_(self.beta2).add_((d * g).sum(1), alpha=1 - self.beta2)
        m.lerp_(d, 1 - self.momentum)
        norm = v.div(1 - self.beta2 ** (t + 1)).sqrt_().add_(1e-8)
        return m * (-lr / (1 - self.momentum ** (t + 1)) / norm)[:, None]


def rls_update(
    p: Tensor, s: Tensor, gain: float, forgetting: float, keep: float, drift: float
) -> Tensor:
    """P ← keep · (inverse of λ P⁻¹ + (κ/r) SᵀS) + drift · I in place, for p [n, n] and s [r, n].

    Returns:
        h = λ + κ · mean over the rows of s P sᵀ, a scalar tensor.
    """
    rank = s.shape[0]
    beta = keep / forgetting
    if rank == 1:
        u = torch.mv(p, s[0])
        h = forgetting + gain * torch.dot(s[0], u)
        u.mul_((gain * beta / h).sqrt())
        p.addr_(u, u, beta=beta, alpha=-1)
    else:
        u = s @ p
        k = u @ s.T
        h = forgetting + gain * k.trace() / rank
        k.diagonal().add_(forgetting * rank / gain)
        v = torch.linalg.solve_triangular(torch.linalg.cholesky(k), u, upper=False)
        p.addmm_(v.T, v, beta=beta, alpha=-beta)
    if drift:
        p.diagonal().add_(drift)
    return h


def _covered(m: nn.Module) -> bool:
    if isinstance(m, nn.Conv2d):
        return m.groups == 1 and m.padding_mode == "zeros" and not isinstance(m.padding, str)
    return isinstance(m, nn.Linear)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).to(like).mul_(2).sub_(1)


def _linear_rows(layer, x, summary, rank, generator):
    """Summary [r, n] of a Linear's input, and the same of a column of ones [r, 1]."""
    x = x.flatten(0, -2)
    rows = x.shape[0]
    if summary == "mean":
        s = x.mean(0, keepdim=True) if rank == 1 else _slice_means(x, rank)
        return s, s.new_ones(rank, 1)
    if summary == "sample":
        return x[torch.randint(rows, (rank,), generator=generator)], x.new_ones(rank, 1)
    eps = _signs((rank, rows), x, generator).div_(rows**0.5)
    return eps @ x, eps.sum(1, keepdim=True)


def _slice_means(x: Tensor, rank: int) -> Tensor:
    return torch.stack([x[k::rank].mean(0) for k in range(rank)])


def _conv_rows(layer, x, summary, rank, generator):
    """Summary [r, n] of a Conv2d's im2col patches, and the same of a column of ones [r, 1]."""
    size, stride, pad, dil = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    if summary == "mean":
        images = x.mean(0, keepdim=True) if rank == 1 else _slice_means(x, rank)
        s = F.unfold(images, size, dilation=dil, padding=pad, stride=stride).mean(2)
        return s, s.new_ones(rank, 1)
    count = x.shape[0]
    out = [
        (x.shape[2 + i] + 2 * pad[i] - dil[i] * (size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    if summary == "sketch":
        eps = _signs((count, rank, *out), x, generator).div_((count * out[0] * out[1]) ** 0.5)
        s = conv2d_weight(x, (rank, x.shape[1], *size), eps, stride, pad, dil)
        return s.flatten(1), eps.sum((0, 2, 3))[:, None]
    image = torch.randint(count, (rank,), generator=generator)
    index, inside = [], []
    for i in (0, 1):  # rows, then columns, of each patch; outside the image the value is zero
        start = torch.randint(out[i], (rank, 1), generator=generator) * stride[i] - pad[i]
        at = start + torch.arange(size[i]) * dil[i]
        inside.append((at >= 0) & (at < x.shape[2 + i]))
        index.append(at.clamp_(0, x.shape[2 + i] - 1))
    patch = x[image[:, None, None], :, index[0][:, :, None], index[1][:, None, :]]
    patch = patch * (inside[0][:, :, None] & inside[1][:, None, :])[..., None]
    return patch.permute(0, 3, 1, 2).flatten(1), x.new_ones(rank, 1)
