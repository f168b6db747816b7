"""Linear layers stored as two thin matrices, W ~ u v, as laser.py makes them."""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn

from quantized import replace_module


class Factored(nn.Module):
    """A linear layer of the weight u v: u (out, k), v (k, in)."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool):
        super().__init__()
        self.v, self.u = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.u(self.v(x))


def factor_like(model: nn.Module, arrays: dict[str, mx.array]):
    """Make those layers of a model factored that are so in `arrays` (by name)."""
    for path, module in model.named_modules():
        thin = arrays.get(f"{path}.v.scales", arrays.get(f"{path}.v.weight"))  # packed, or not
        if isinstance(module, nn.Linear) and f"{path}.u.weight" in arrays and thin is not None and thin.ndim == 2:
            outputs, inputs = module.weight.shape
            replace_module(model, path, Factored(inputs, outputs, len(thin), "bias" in module))
