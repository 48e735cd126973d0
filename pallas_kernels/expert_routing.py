"""From router logits to the slots of the grouped kernels.

    logits [t, e]  ->  experts and weights [t, k], the k best of each token      `route`
                   ->  slots: the t · k pairs (token, choice), sorted by expert,
                       padding tokens last                                       `sort_by_expert`
                   ->  the list of tiles                                         `work_list`

`route_experts_reference` is these three, each some operations of XLA. `route_experts_triton` is one
kernel for small batches, where XLA launches some twenty small ones.

In the kernel nothing is sorted. A token goes to an expert at most once, so with M[token, expert] =
1 where it does, the pair's place is

    Σ sizes of the experts before  +  Σ M[tokens before, expert]

two running sums over a tile `[t, e]` that one program holds. The k best of a row are found one
after the other: the maximum, of equals the lowest index, is taken out. Compared are the bits as
integers in the order of the floats, so that NaN logits are an order like any other and no index
leaves its range.
"""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.pallas_kernels.grouped_matmul import Slots, tiles_needed, work_list
from fp8jax.pallas_kernels.quantize import ACTIVATION_DTYPES, power_of_two, rounded

# Values of [t, e] rounded up to powers of two; some five such tiles are in registers at once.
MAX_TILE = 8192
# The choices are unrolled; with 16 of them the largest tile spills registers.
MAX_TOP_K = 12
_LOWEST = -(2**31)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How logits become experts and weights; hashable, so that it can be static.

    Args:
        top_k: experts of a token.
        softmax_over: "all" experts before the choice, or the "chosen" ones after it.
        renormalise: whether the weights of a token are divided by their sum.
        weight_dtype: name of the dtype that weights are rounded to.
    """

    top_k: int
    softmax_over: Literal["all", "chosen"]
    renormalise: bool
    weight_dtype: str


def route(logits: jax.Array, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Choose experts and weigh them.

    Args:
        logits: float `[t, e]`.
        rule: the family's way.
    Returns:
        experts int32 `[t, k]`, the strongest first, of equals the lower index; weights float32
        `[t, k]`.
    """
    wide = rounded(logits.astype(jnp.float32), logits.dtype)
    if rule.softmax_over == "chosen":
        strongest, experts = lax.top_k(wide, rule.top_k)
        weights = jax.nn.softmax(strongest, axis=-1)
    else:
        weights, experts = lax.top_k(jax.nn.softmax(wide, axis=-1), rule.top_k)
    if rule.renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return experts, rounded(weights, rule.weight_dtype)


def sort_by_expert(
    experts: jax.Array, weights: jax.Array, num_experts: int, valid: jax.Array | None = None
) -> Slots:
    """Sort the pairs (token, choice) by expert, stably; those of padding come last and belong to no
    one.

    Args:
        experts: int32 `[t, k]`, different ones in a row.
        weights: float32 `[t, k]`.
        num_experts: e.
        valid: bool `[t]`, which tokens are not padding; None for all.
    Returns:
        slots that read the row of their token and become row choice · t + token.
    """
    t, k = experts.shape
    if valid is not None:
        experts = jnp.where(valid[:, None], experts, jnp.int32(num_experts))
    key = experts.reshape(-1)
    pair = jnp.argsort(key, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(num_experts, jnp.int32).at[key].add(1, mode="drop")
    return Slots(
        sizes=sizes,
        row=pair // k,
        out_row=pair % k * t + pair // k,
        weight=weights.reshape(-1)[pair],
    )


def route_experts_reference(
    logits: jax.Array,
    rule: Rule,
    block_m: int | None = None,
    *,
    valid: jax.Array | None = None,
) -> Slots:
    """The specification.

    Args:
        logits: float `[t, e]`.
        rule: the family's way.
        block_m: slots of a tile of the list for the kernels; None for no list.
        valid: bool `[t]`, which tokens are not padding; None for all.
    Returns:
        the slots of all pairs (token, choice), as `sort_by_expert` makes them.
    """
    t, e = logits.shape
    slots = sort_by_expert(*route(logits, rule), e, valid)
    if block_m is None:
        return slots
    return replace(slots, work=work_list(slots.sizes, t * rule.top_k, block_m), block_m=block_m)


@functools.partial(jax.jit, static_argnames=("rule", "block_m", "interpret"))
def route_experts_triton(
    logits: jax.Array,
    rule: Rule,
    block_m: int,
    *,
    valid: jax.Array | None = None,
    interpret: bool = False,
) -> Slots:
    """What `route_experts_reference` computes, in one kernel.

    Args:
        logits: bfloat16, float16 or float32 `[t, e]`.
        rule: the family's way.
        block_m: slots of a tile.
        valid: bool `[t]`, which tokens are not padding; None for all.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        slots with their list of tiles.
    Raises:
        NotImplementedError: `why_not` says why.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    t, e = logits.shape
    k, slots = rule.top_k, t * rule.top_k
    if reason := why_not(t, e, k, logits.dtype):
        raise NotImplementedError(f"route_experts: {reason}")
    block_t, block_e, tiles = power_of_two(t), power_of_two(e), tiles_needed(slots, e, block_m)

    # In: logits [t, e] and, if given, valid [t] int32.
    # Out: row, out_row, weight [t · k], sizes [e], work [4, tiles].
    def kernel(*refs):
        logits_ref, *optional, row_ref, out_row_ref, weight_ref, sizes_ref, work_ref = refs
        tokens, experts = jnp.arange(block_t, dtype=jnp.int32), jnp.arange(block_e, dtype=jnp.int32)
        is_token, is_expert = tokens < t, experts < e
        wide = plgpu.load(
            logits_ref.at[tokens[:, None], experts[None, :]],
            mask=is_token[:, None] & is_expert[None, :],
            other=0.0,
        ).astype(jnp.float32)
        counts = (
            is_token
            if not optional
            else plgpu.load(optional[0].at[tokens], mask=is_token, other=0) > 0
        )

        score = _softmax(wide, is_expert[None, :]) if rule.softmax_over == "all" else wide
        chosen, weights = _best(score, is_expert[None, :], k)
        weights = _finished(weights, rule)

        member = functools.reduce(
            jnp.logical_or, (experts[None, :] == index[:, None] for index in chosen)
        )
        member = (member & counts[:, None]).astype(jnp.int32)
        sizes = jnp.sum(member, axis=0, dtype=jnp.int32)
        ends = lax.cumsum(sizes)
        starts, total = ends - sizes, jnp.sum(sizes, dtype=jnp.int32)
        place = starts[None, :] + lax.cumsum(member, axis=0) - member
        absent = (is_token & ~counts).astype(jnp.int32)
        behind = total + (lax.cumsum(absent) - absent) * k
        for j, (index, weight) in enumerate(zip(chosen, weights, strict=True)):
            of_expert = jnp.sum(
                jnp.where(experts[None, :] == index[:, None], place, 0), axis=1, dtype=jnp.int32
            )
            slot = jnp.where(counts, of_expert, behind + j)
            plgpu.store(row_ref.at[slot], tokens, mask=is_token)
            plgpu.store(out_row_ref.at[slot], tokens + jnp.int32(j * t), mask=is_token)
            plgpu.store(weight_ref.at[slot], weight, mask=is_token)
        plgpu.store(sizes_ref.at[experts], sizes, mask=is_expert)

        def write(at, mask, fields):
            # Nowhere where masked: interpreted, a masked store writes the old value back, over a
            # new one in the same place.
            at = jnp.where(mask, at, jnp.int32(tiles))
            for field, values in enumerate(fields):
                plgpu.store(
                    work_ref.at[jnp.full_like(at, field), at],
                    jnp.broadcast_to(values, at.shape),
                    mask=mask,
                )

        tiles_of = lax.div(sizes + (block_m - 1), jnp.int32(block_m))
        last, count = lax.cumsum(tiles_of), jnp.sum(tiles_of, dtype=jnp.int32)
        for part in range(-(-t // block_m)):  # an expert has at most t slots
            start = starts + part * block_m
            fields = (experts, start, jnp.minimum(start + block_m, ends), jnp.int32(1))
            write(last - tiles_of + part, part < tiles_of, fields)
        index = jnp.arange(power_of_two(tiles), dtype=jnp.int32)
        start = total + (index - count) * block_m
        fields = (
            jnp.int32(0),
            jnp.minimum(start, slots),
            jnp.minimum(start + block_m, slots),
            jnp.int32(0),
        )
        write(index, (index >= count) & (index < tiles), fields)

    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    row, out_row, weight, sizes, work = pl.pallas_call(
        kernel,
        out_shape=(
            i32((slots,)),
            i32((slots,)),
            jax.ShapeDtypeStruct((slots,), jnp.float32),
            i32((e,)),
            i32((4, tiles)),
        ),
        grid=(1,),
        compiler_params=plgpu.CompilerParams(
            num_warps=max(1, block_t * block_e // 512), num_stages=1
        ),
        interpret=interpret,
        name="route_experts",
    )(logits, *(() if valid is None else (valid.astype(jnp.int32),)))
    return Slots(sizes=sizes, row=row, out_row=out_row, weight=weight, work=work, block_m=block_m)


def why_not(t: int, e: int, top_k: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why there is no kernel for this case, or None if there is one."""
    if jnp.dtype(dtype).name not in ACTIVATION_DTYPES:
        return (
            f"logits are {jnp.dtype(dtype).name}, the kernel takes {', '.join(ACTIVATION_DTYPES)}"
        )
    if t == 0 or power_of_two(t) * power_of_two(e) > MAX_TILE:
        return (
            f"{t} tokens × {e} experts: one program holds all logits, at least one token and at "
            f"most {MAX_TILE} values"
        )
    if top_k > MAX_TOP_K:
        return f"top_k = {top_k}: the choices are unrolled, at most {MAX_TOP_K}"
    return None


def _softmax(x: jax.Array, inside: jax.Array) -> jax.Array:
    """Of each row; 0 outside."""
    highest = jnp.max(jnp.where(inside, x, -jnp.inf), axis=1)
    powers = jnp.where(inside, jnp.exp(x - highest[:, None]), jnp.float32(0))
    return powers / jnp.sum(powers, axis=1)[:, None]


def _best(score: jax.Array, inside: jax.Array, k: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """The k greatest of each row, the greatest first, of equals the one on the left: indices and
    scores `[t]`."""
    bits = lax.bitcast_convert_type(score, jnp.int32)
    order = bits ^ (lax.shift_right_arithmetic(bits, jnp.int32(31)) & jnp.int32(2**31 - 1))
    order = jnp.where(inside, jnp.maximum(order, jnp.int32(_LOWEST + 1)), jnp.int32(_LOWEST))
    columns = jnp.broadcast_to(jnp.arange(score.shape[1], dtype=jnp.int32)[None, :], score.shape)
    indices, scores = [], []
    for _ in range(k):
        equal = order == jnp.max(order, axis=1)[:, None]
        index = jnp.min(jnp.where(equal, columns, jnp.int32(score.shape[1])), axis=1)
        taken = columns == index[:, None]
        indices.append(index)
        scores.append(jnp.sum(jnp.where(taken, score, jnp.float32(0)), axis=1))
        order = jnp.where(taken, jnp.int32(_LOWEST), order)
    return indices, scores


def _finished(weights: list[jax.Array], rule: Rule) -> list[jax.Array]:
    """The chosen scores `[t]`, the greatest first, as weights: softmax over the chosen or division
    by their sum, where the rule says so, and rounding."""
    if rule.softmax_over == "chosen":
        weights = [jnp.exp(weight - weights[0]) for weight in weights]
    if rule.softmax_over == "chosen" or rule.renormalise:
        total = functools.reduce(jnp.add, weights)
        weights = [weight / total for weight in weights]
    return [weight.astype(rule.weight_dtype).astype(jnp.float32) for weight in weights]
