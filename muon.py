"""Muon, an optimizer for the matrices of a network (Jordan et al. 2024). The update is the momentum with all singular
values set to about 1, so that it moves a matrix by the same length in every direction.

    muon, rest = Muon(0.05), optim.Adam(1e-2)
    opt = optim.MultiOptimizer([muon, rest], [by_muon])  # embeddings and vectors go to the rest
"""
import re
import sys
from collections.abc import Callable

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten


def by_muon(path: str, p: mx.array) -> bool:
    """Whether Muon takes the parameter of this path: the matrices of the blocks, adapters' among them. Left out are
    embeddings, the experts' biases, and the matrices that compute a gate or choose a path: each of their few rows is a
    direction of its own.
    """
    left_out = re.search(r"router|predictor|value_gate|embed|bias$", path)
    return path.startswith("blocks.") and p.ndim > 1 and not left_out


class Muon(optim.Optimizer):
    """Updates matrices (..., rows, columns). There is no weight decay in it: the scripts decay the matrices themselves.

    learning_rate: the size of the update's singular values, times sqrt(rows / columns) for tall matrices. momentum: the
    decay of the gradient's mean, with Nesterov's look ahead. dtype: of the iteration that sets the singular values.

    All matrices of one shape go through that iteration as one batch. One by one and in float32, they would take as long
    as the rest of the step on a GPU. The processes of `group` share them out, and gather the results. Where a process
    has parts of the parameters, whole(tree) gives whole arrays from these parts, and own(tree) the parts.
    """

    def __init__(self, learning_rate: float, momentum: float = 0.95, dtype: mx.Dtype = mx.float32,
                 group: mx.distributed.Group | None = None):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.momentum, self.dtype, self.group = momentum, dtype, group
        self.whole = self.own = lambda tree: tree

    def init_single(self, parameter: mx.array, state: dict):
        state["v"] = mx.zeros_like(parameter)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        if not self._initialized:
            self.init(gradients)
        self.state["step"] = self.step + 1

        def with_momentum(g: mx.array, state: dict) -> mx.array:
            state["v"] = self.momentum * state["v"] + (1 - self.momentum) * g
            return (1 - self.momentum) * g + self.momentum * state["v"]

        updates, by_shape = self.whole(tree_map(with_momentum, gradients, self.state)), {}
        updates = dict(tree_flatten(updates))
        for name, update in updates.items():
            by_shape.setdefault(update.shape[-2:], []).append(name)
        for (rows, columns), names in by_shape.items():
            parts = [updates[name].reshape(-1, rows, columns) for name in names]  # experts are many matrices each
            X = shared_out(orthogonalized, mx.concatenate(parts).astype(self.dtype), self.group)
            X = X * (max(1, rows / columns) ** 0.5 * self.learning_rate)
            ends = np.cumsum([len(part) for part in parts])[:-1].tolist()
            for name, part in zip(names, mx.split(X, ends) if ends else [X], strict=True):
                updates[name] = part.reshape(updates[name].shape)
        return tree_map(lambda update, p: p - update, self.own(tree_unflatten(list(updates.items()))), parameters)


def shared_out(f: Callable, X: mx.array, group: mx.distributed.Group | None) -> mx.array:
    """f(X) for a function of each of the N rows of X by itself: every process computes a part of them."""
    if group is None or group.size() == 1:
        return f(X)
    N, own = len(X), -(-len(X) // group.size())
    X = mx.pad(X, [(0, own * group.size() - N), *[(0, 0)] * (X.ndim - 1)])
    return mx.distributed.all_gather(f(X[group.rank() * own:(group.rank() + 1) * own]), group=group)[:N]


def orthogonalized(X: mx.array, steps: int = 5) -> mx.array:
    """Roughly U V^T of each matrix's singular value decomposition U S V^T, by a Newton-Schulz iteration: (N, rows,
    columns). A step takes each singular value s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which ends at about 1."""
    tall = X.shape[1] > X.shape[2]
    X = X.swapaxes(1, 2) if tall else X
    X = X / (mx.linalg.norm(X, axis=(1, 2), keepdims=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.swapaxes(1, 2)
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * (A @ A)) @ X
    return X.swapaxes(1, 2) if tall else X


if __name__ == "__main__":
    print("muon.py has no command of its own: run train.py, which uses it", file=sys.stderr)
    sys.exit(2)
