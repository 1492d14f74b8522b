"""Linear layers: x W + b, with the low-rank part of an adapter beside it."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float


@jax.custom_vjp
def matmul(x: Float[Array, "*rows I"], kernel: Float[Array, "I O"]) -> Float[Array, "*rows O"]:
    """x W, with the narrower operand on the left in the gradient of W.

    XLA's matrix products on a CPU want the summed axis of the left operand last, and write one where it is not anew,
    transposed. JAX's own rule has the gradient of the outcome there, in a gated MLP the widest array of the model.
    """
    return x @ kernel


def _matmul_forward(x, kernel):
    # A weight that is not trained, the base of an adapter, needs no gradient, and so no x to make it of.
    return matmul(x.value, kernel.value), (x.value if kernel.perturbed else None, kernel.value)


def _matmul_backward(operands, gradient):
    x, kernel = operands
    of_x = jax.lax.dot_general(gradient, kernel, (((gradient.ndim - 1,), (1,)), ((), ())))
    if x is None:
        return of_x, None
    rows = tuple(range(x.ndim - 1))
    if x.shape[-1] <= gradient.shape[-1]:
        return of_x, jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))
    return of_x, jax.lax.dot_general(gradient, x, ((rows, rows), ((), ()))).T


matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


class Linear(nn.Module):
    """x W + b with W stored (in, out), and (x A) B beside it where an adapter is laid over the layer (see `lora`)."""

    features: int
    bias: bool

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        out = matmul(x, kernel)
        if self.has_variable("params", "lora_a"):
            out = out + (x @ self.get_variable("params", "lora_a")) @ self.get_variable("params", "lora_b")
        return out + self.param("bias", nn.initializers.zeros, (self.features,))[None, None] if self.bias else out
