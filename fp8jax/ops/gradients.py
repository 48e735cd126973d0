"""What the gradient of an FP8 operation is, and how it gets past the codes.

    forward     y = x̂ @ ŵ.T + b          x̂ = q_x · s_x, ŵ = q_w · s_w, both rounded to e4m3
    backward    dx = dy @ ŵ              db = Σ dy              none for q and s

Rounding is a staircase: its derivative is 0 or infinite. The *straight-through* estimate takes
dx̂/dx = 1, so that dx is the gradient of the product with the dequantized weight. It is summed in
float32 and has the dtype of x. Left to itself, JAX would push dy through the cast to e4m3, where it
loses all but 3 bits, and everything outside of ±448 and 2⁻⁹.

An operation that fuses with quantization hands over codes and scales, neither of which can carry a
gradient. So a `QActivation` also has a *carrier*: the floats that were quantized, or, where a
kernel never wrote these, zeros of their shape. A product does not read it, so XLA removes it from a
forward pass; dx is the carrier's cotangent, and the operation that made it answers with the
gradient of its plain formula.

Weights as codes and scales cannot be trained: a gradient step is far smaller than the distance of
two codes. Asking for it is an error (`refused`) rather than zeros. What can be trained over an FP8
model is everything that is float: inputs, embeddings, norms, adapters beside its layers.

    def loss(adapters, x):
        y = scaled_matmul(x, w) + (x @ adapters["a"]) @ adapters["b"]
        …
    jax.grad(loss)(adapters, x)       # w is closed over, or an argument that grad leaves alone

Source: Bengio, Léonard, Courville 2013, section 3.1, for the straight-through estimate.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.no_gradient import refused
from fp8jax.pallas_kernels.grouped_matmul import Slots, over_tiles, tile_list

_CODES_ARE_CONSTANT = (
    "codes and scales of a QActivation have no gradient. Make it with fp8jax.quantize_activation, "
    "whose result carries the gradient to the floats that were quantized, or stop the gradient "
    "with jax.lax.stop_gradient"
)


def constant_activation(codes_and_scale: Any) -> Any:
    """The same for the codes and scales of activations."""
    return refused(codes_and_scale, TypeError(_CODES_ARE_CONSTANT))


def with_backward(
    forward: Callable[..., Any],
    backward: Callable[[Any, Any], tuple[Any, ...]],
    *arguments: Any,
    kept: Callable[..., Any] = lambda *arguments: arguments,
) -> Any:
    """forward(*arguments), differentiated by a rule of its own.

    Args:
        forward: closes over nothing that is traced.
        backward: (what was kept, cotangent of the result) -> one cotangent an argument, None where
            there is none.
        arguments: pytrees of arrays.
        kept: what of the arguments the backward pass needs.
    """

    @jax.custom_vjp
    def operation(*arguments):
        return forward(*arguments)

    operation.defvjp(lambda *arguments: (forward(*arguments), kept(*arguments)), backward)
    return operation(*arguments)


def with_gradient_of(
    plain: Callable[..., Any], kernel: Callable[..., tuple[Any, Any]], *arguments: Any
) -> Any:
    """What a kernel computes, with the gradient of a plain formula.

    Args:
        plain: arguments -> floats.
        kernel: arguments -> (floats as above, codes and integers); closes over nothing that is
            traced, as plain.
        arguments: pytrees of arrays.
    Returns:
        What the kernel returns; its second half is constant to a derivative.
    """

    def backward(arguments, cotangents):
        return jax.vjp(plain, *arguments)[1](cotangents[0])

    floats, constants = with_backward(kernel, backward, *arguments)
    return floats, lax.stop_gradient(constants)


def dtype_of_products(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What a backward product's operands are rounded to: bfloat16 beside bfloat16 activations, else
    float32.

    float16 ends at 6e-8, above what cotangents and small weights often are.
    """
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def product_with(dy: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """dy `[m, n]` @ weight `[n, k]`, for activations of `dtype`; float32 `[m, k]`."""
    dtype = dtype_of_products(dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    contract = (((1,), (0,)), ((), ()))
    operands = dy.astype(dtype), weight.astype(dtype)
    return lax.dot_general(
        *operands, contract, precision=precision, preferred_element_type=jnp.float32
    )


def of_slots(slots: Slots, d_weight: jax.Array | None) -> Any:
    """The cotangent of slots, of which only the weights have one."""
    nothing: Any = None
    return replace(slots, sizes=nothing, row=None, out_row=None, work=None, weight=d_weight)


def grouped_backward(
    dy: jax.Array,
    weight_of: Callable[[jax.Array], jax.Array],
    x: Callable[[], jax.Array],
    x_shape: tuple[int, ...],
    slots: Slots,
    *,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of a grouped product with respect to its rows and the weights of its slots.

    With g[slot] = dy[out_row[slot]] @ ŵ[expert of slot]: d weight[slot] = g · x̂[row[slot]], and
    dx[row] is the sum of weight · g over the slots that read the row.

    Args:
        dy: float `[r, n]`.
        weight_of: expert -> its weight `[n, k]`, any float.
        x: the rows `[m, k]` that were multiplied, called where slots have a weight.
        x_shape: m, k.
        slots: which rows met which expert.
        dtype: of activations.
    Returns:
        dx in that dtype, and d weight float32 or None.
    """
    (count, _), (m, k) = dy.shape, x_shape
    if slots.out_row is not None:
        dy = dy[slots.out_row]

    def product(expert: jax.Array, tile: jax.Array) -> jax.Array:
        return product_with(dy[tile], weight_of(expert), dtype)

    g = over_tiles(product, Slots(slots.sizes), m=count, n=k, out_dtype=jnp.float32)
    d_weight = None
    if slots.weight is not None:
        # What lies in the place of padding may be NaN, and 0 · NaN is not 0.
        used = jnp.arange(count, dtype=jnp.int32) < jnp.sum(slots.sizes)
        read = x().astype(jnp.float32)
        read = read if slots.row is None else read[slots.row]
        d_weight = jnp.where(used, jnp.sum(g * read, axis=1), jnp.float32(0))
        g = jnp.where(used, slots.weight, jnp.float32(0))[:, None] * g
    if slots.row is not None:
        g = jnp.zeros((m, k), jnp.float32).at[slots.row].add(g)
    return g.astype(dtype), d_weight


def grouped_weight_gradient(x: jax.Array, dy: jax.Array, slots: Slots) -> jax.Array:
    """Gradient of a grouped product with respect to a stack of floats, which has the dtype of x.

    An expert's tiles follow each other, so that one expert at a time is summed in float32 beside
    the stack that is returned.

    Args:
        x: float `[m, k]`.
        dy: float `[r, n]`.
        slots: which rows met which expert.
    Returns:
        `[e, n, k]`.
    """
    (count, n), (m, k), num_experts = dy.shape, x.shape, slots.sizes.shape[0]
    row = jnp.arange(m, dtype=jnp.int32) if slots.row is None else slots.row
    block_m = min(128, max(8, count))
    tiles = tile_list(slots.sizes, count, block_m)
    at_slot = jnp.arange(count, dtype=jnp.int32) if slots.out_row is None else slots.out_row

    def add_tile(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, stack = state
        expert, slot = tiles.expert[j], tiles.start[j] + jnp.arange(block_m, dtype=jnp.int32)
        inside, slot = slot < tiles.end[j], jnp.minimum(slot, count - 1)
        left = dy[at_slot[slot]].astype(jnp.float32)
        left = left if slots.weight is None else left * slots.weight[slot][:, None]
        left = jnp.where(inside[:, None], left, jnp.float32(0))
        right = jnp.where(inside[:, None], x[row[slot]], jnp.zeros((), x.dtype))
        added = product_with(left.T, right, x.dtype)
        is_first = (j == 0) | (tiles.expert[jnp.maximum(j - 1, 0)] != expert)
        total = jnp.where(is_first, added, total + added)
        return total, lax.dynamic_update_index_in_dim(stack, total.astype(x.dtype), expert, axis=0)

    start = jnp.zeros((n, k), jnp.float32), jnp.zeros((num_experts, n, k), x.dtype)
    return lax.fori_loop(jnp.int32(0), tiles.count, add_tile, start)[1]
