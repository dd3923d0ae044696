"""L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from optimstate.installed_torch import LBFGS_LIMITS_LINE_SEARCH, LBFGS_MAXIMIZES
from optimstate.optim._line_search import strong_wolfe
from optimstate.optim._load import Slots
from optimstate.optim.optimizer import Optimizer, ParamsT, check_lr, require, to_scalar

__all__ = ["LBFGS"]

KEPT = ("d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss")
Closure = Callable[[], Any]


class LBFGS(Optimizer, torch.optim.LBFGS):
    r"""L-BFGS: Newton's direction estimated from a short history of gradients, for all parameters together.

    With :math:`s` and :math:`y` the last changes of parameters and gradient, :math:`H` the inverse Hessian that the
    kept pairs :math:`(s, y)` imply (two-loop recursion, starting from :math:`s^T y / y^T y`), and :math:`\tau` the
    learning rate or the result of a line search:

    .. math::
        \theta \leftarrow \theta - \tau H g

    One call of ``step`` iterates until ``max_iter``, ``max_eval`` or a tolerance is reached. All parameters are in one
    group and on one device; memory for ``history_size`` pairs of copies of all parameters is needed. Sources: Nocedal,
    "Updating quasi-Newton matrices with limited storage", https://doi.org/10.1090/S0025-5718-1980-0572855-7; Nocedal
    and Wright, "Numerical Optimization", algorithms 3.5, 3.6 and 7.4.

    State, held by the first parameter; n is the number of real elements of all parameters together:
        func_evals, n_iter: Ints, how often the closure was called and how many iterations were made.
        d: The last direction, (n,).
        t: Its step length, a number or a 0-d tensor.
        old_dirs, old_stps: Lists of :math:`y` and of :math:`s`, each (n,).
        ro: A list of :math:`1 / y^T s`, 0-d.
        H_diag: The scale of the first guess of H.
        prev_flat_grad: The gradient, (n,), and prev_loss the loss before the last iteration.
        al: Working memory of the recursion.

    Args:
        params: Tensors or ``(name, tensor)`` pairs; one group only.
        lr: Learning rate, at least 0, or a 1-element tensor.
        max_iter: Most iterations in a step.
        max_eval: Most calls of the closure in a step; None for 5/4 of ``max_iter``.
        tolerance_grad: Stop when no element of the gradient is larger than this.
        tolerance_change: Stop when parameters or loss change by no more than this.
        history_size: How many pairs to keep.
        line_search_fn: None, or "strong_wolfe".
        maximize: Ascend instead of descend. torch's class has this argument since 2.14.

    Raises:
        ValueError: A hyperparameter is out of range, or there are several param groups.
        RuntimeError: The line search is unknown.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        maximize: bool = False,
    ) -> None:
        check_lr(lr)
        defaults: dict[str, Any] = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        if maximize or LBFGS_MAXIMIZES:
            defaults["maximize"] = maximize
        super().__init__(params, defaults)
        require(len(self.param_groups) == 1, "LBFGS doesn't support per-parameter options (parameter groups)")

    @property
    def _params(self) -> list[Tensor]:
        params: list[Tensor] = self.param_groups[0]["params"]
        return params

    @override
    def _slot_shapes(self, p: Tensor, group: dict[str, Any]) -> Slots:
        flat = (self._numel(),)
        return {"func_evals": None, "n_iter": None}, {"d": flat, "prev_flat_grad": flat}

    @torch.no_grad()
    def step(self, closure: Closure) -> Any:  # type: ignore[override]
        """Iterate until a limit or a tolerance is reached.

        Args:
            closure: Clears the gradients, computes loss and gradients, and returns the loss.

        Returns:
            The loss before the first iteration.

        Raises:
            RuntimeError: The line search is unknown.
        """
        if len(self.param_groups) != 1:
            raise AssertionError(f"Expected exactly one param_group, but got {len(self.param_groups)}")
        group = self.param_groups[0]
        closure = torch.enable_grad()(closure)
        if not self._params:
            return closure()
        state = self.state[self._params[0]]  # the first parameter holds the state of all
        state.setdefault("func_evals", 0)
        state.setdefault("n_iter", 0)
        first_loss = closure()
        loss = self._descending(first_loss)
        evaluations = 1
        state["func_evals"] += 1
        grad = self._gather_flat_grad()
        if largest(grad) <= group["tolerance_grad"]:
            return first_loss
        now = {name: state.get(name) for name in KEPT}
        iteration = 0
        while iteration < group["max_iter"]:
            iteration += 1
            state["n_iter"] += 1
            now["d"] = self._direction(state, now, grad, group["history_size"])
            now["prev_flat_grad"] = grad  # no copy: every evaluation makes a new gradient
            now["prev_loss"] = loss
            now["t"] = to_scalar(group["lr"])
            if state["n_iter"] == 1:
                now["t"] = min(1.0, 1.0 / grad.abs().sum()) * now["t"]
            slope = grad.dot(now["d"])
            if slope > -group["tolerance_change"]:
                break
            last = iteration == group["max_iter"]
            loss, grad, calls = self._move(closure, now, loss, grad, slope, group["max_eval"] - evaluations, last)
            evaluations += calls
            state["func_evals"] += calls
            if last or evaluations >= group["max_eval"] or self._converged(now, loss, grad):
                break
        state.update(now)
        return first_loss

    def _direction(self, state: dict[str, Any], now: dict[str, Any], grad: Tensor, history_size: int) -> Tensor:
        """Minus the gradient times the inverse Hessian, after the last move was added to the history."""
        if state["n_iter"] == 1:
            now.update(old_dirs=[], old_stps=[], ro=[], H_diag=1)
            return grad.neg()
        dirs, steps, ro = now["old_dirs"], now["old_stps"], now["ro"]
        y = grad.sub(now["prev_flat_grad"])
        s = now["d"].mul(now["t"])
        ys = y.dot(s)
        if ys > 1e-10:
            if len(dirs) == history_size:
                for history in (dirs, steps, ro):
                    history.pop(0)
            dirs.append(y)
            steps.append(s)
            ro.append(1.0 / ys)
            now["H_diag"] = ys / y.dot(y)
        al = state.setdefault("al", [None] * history_size)
        q = grad.neg()
        for i in reversed(range(len(dirs))):
            al[i] = steps[i].dot(q) * ro[i]
            q.add_(dirs[i], alpha=-al[i])
        direction = q.mul_(now["H_diag"])
        for i in range(len(dirs)):
            direction.add_(steps[i], alpha=al[i] - dirs[i].dot(direction) * ro[i])
        return direction

    def _move(
        self,
        closure: Closure,
        now: dict[str, Any],
        loss: float,
        grad: Tensor,
        slope: Tensor,
        calls_left: int,
        last: bool,
    ) -> tuple[float, Tensor, int]:
        """Move along the direction; the loss and gradient there, and the number of calls of the closure."""
        search = self.param_groups[0]["line_search_fn"]
        d = now["d"]
        if search is None:
            self._add_grad(now["t"], d)
            if last:  # another evaluation would not be used
                return loss, grad, 0
            loss = self._descending(closure())
            return loss, self._gather_flat_grad(), 1
        if search != "strong_wolfe":
            raise RuntimeError("only 'strong_wolfe' is supported")
        start = self._clone_param()

        def evaluate(t: Any) -> tuple[float, Tensor]:
            return self._directional_evaluate(closure, start, t, d)

        most = calls_left if LBFGS_LIMITS_LINE_SEARCH else 25
        loss, grad, now["t"], calls = strong_wolfe(evaluate, now["t"], d, loss, grad, slope, max_calls=most)
        self._add_grad(now["t"], d)
        return loss, grad, calls

    def _converged(self, now: dict[str, Any], loss: float, grad: Tensor) -> bool:
        group = self.param_groups[0]
        change = group["tolerance_change"]
        return bool(
            largest(grad) <= group["tolerance_grad"]
            or largest(now["d"].mul(now["t"])) <= change
            or abs(loss - now["prev_loss"]) < change
        )

    def _gather_flat_grad(self) -> Tensor:
        """All gradients as one real vector, with zeros for parameters that have none."""
        pieces = []
        for p in self._params:
            if p.grad is None:
                piece = p.new_zeros(p.numel())
            else:
                piece = (p.grad.to_dense() if p.grad.is_sparse else p.grad).reshape(-1)
            pieces.append(torch.view_as_real(piece).view(-1) if piece.is_complex() else piece)
        flat = torch.cat(pieces, 0)
        return flat.neg_() if self._maximize else flat

    @property
    def _maximize(self) -> bool:
        return bool(self.param_groups[0].get("maximize", False))

    def _descending(self, loss: Any) -> float:
        """The loss as a number to minimize."""
        return -float(loss) if self._maximize else float(loss)

    def _numel(self) -> int:
        """How many real numbers all parameters have."""
        return sum(2 * p.numel() if p.is_complex() else p.numel() for p in self._params)

    def _clone_param(self) -> list[Tensor]:
        return [p.clone(memory_format=torch.contiguous_format) for p in self._params]

    def _set_param(self, values: list[Tensor]) -> None:
        for p, value in zip(self._params, values, strict=True):
            p.copy_(value)

    def _directional_evaluate(self, closure: Closure, start: list[Tensor], t: Any, d: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient at `t` times the direction; afterwards the parameters are set to `start`."""
        self._add_grad(t, d)
        loss = self._descending(closure())
        grad = self._gather_flat_grad()
        self._set_param(start)
        return loss, grad

    def _add_grad(self, t: Any, direction: Tensor) -> None:
        """Add `t` times a flat vector to the parameters."""
        offset = 0
        for p in self._params:
            target = torch.view_as_real(p) if p.is_complex() else p
            target.add_(direction[offset : offset + target.numel()].view_as(target), alpha=t)
            offset += target.numel()


def largest(values: Tensor) -> Tensor:
    """The largest magnitude, or NaN if there is one; needs no temporary of the size of the model."""
    low, high = values.aminmax()
    return torch.maximum(high, low.neg())
