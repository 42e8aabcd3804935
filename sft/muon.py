"""Muon (Jordan 2024): momentum whose step for each matrix is its nearest orthogonal one.

torch.optim.Muon takes matrices only, one at a time, and multiplies them in bf16, which costs more than the model on
AVX2. Here those of one shape go together, in bf16 only where that is fast.
"""

import torch
from torch import Tensor

from lumina_rt.weights import fastest_dtype


class Muon(torch.optim.Optimizer):
    """For weights of two dimensions or more; the first is the outputs, the others together the inputs."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "Muon does not evaluate the loss"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for alike in by_shape.values():
                self._step(alike, **group)

    def _step(self, alike: list[Tensor], lr: float, momentum: float, weight_decay: float, **_) -> None:
        """Step weights of one shape, whose products are made together."""
        directions = []
        for p in alike:
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - momentum)
            directions.append(p.grad.lerp(average, momentum).flatten(1))
        dtype = fastest_dtype(alike[0].device.type)
        for p, direction in zip(alike, orthogonal(torch.stack(directions).to(dtype)).float(), strict=True):
            rows, columns = direction.shape
            p.mul_(1 - lr * weight_decay)
            p.sub_(direction.view_as(p), alpha=lr * max(1, rows / columns) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values near 1 by Newton-Schulz steps; the coefficients are Jordan's.

    matrices: [n, rows, columns]. Returns the same.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
