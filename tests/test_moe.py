"""Routing, sorting, tiles and products of a mixture of experts, on shapes where they could go
wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
from fp8jax.models.config import MoEConfig
from fp8jax.models.moe import Experts
from fp8jax.ops import experts as ops
from fp8jax.ops.values import total
from fp8jax.pallas_kernels.expert_routing import Rule, route, sort_by_expert
from fp8jax.pallas_kernels.grouped_matmul import Slots, tile_list, tiles_needed
from fp8jax.schemes import FP8_PER_TENSOR_WHOLE_BATCH

SCHEMES = ("fp8_per_tensor", "fp8_per_block")


def moe_config(e: int, k: int, i: int = 24, **changes) -> MoEConfig:
    fields = {"softmax_over": "all", "renormalise": True, "weight_dtype": "float32", "names": ()}
    fields |= {"num_experts": e, "top_k": k, "intermediate_size": i, **changes}
    return MoEConfig(**fields)  # pyright: ignore


@functools.partial(jax.jit, static_argnames=("scheme", "row_groups"))
def quantized(weight, scheme, row_groups=1) -> fp8jax.QArray:
    return fp8jax.quantize(weight, scheme, row_groups=row_groups)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def close(found, expected, tolerance: float) -> bool:
    """‖found − expected‖ ≤ tolerance · ‖expected‖, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return bool(np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected))


# --- the router


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


ROUTERS = [  # softmax over, renormalise
    ("all", True),
    ("all", False),
    ("chosen", False),
]


@pytest.mark.parametrize("softmax_over, renormalise", ROUTERS)
def test_weights_of_the_chosen_experts(softmax_over, renormalise):
    logits = normal(0, 9, 6)
    rule = Rule(top_k=3, softmax_over=softmax_over, renormalise=renormalise, weight_dtype="float32")
    experts, weights = route(jnp.asarray(logits), rule)
    order = np.argsort(-logits, axis=-1)[:, :3]
    np.testing.assert_array_equal(experts, order)
    chosen = np.take_along_axis(
        logits if softmax_over == "chosen" else softmax(logits.astype(np.float64)), order, -1
    )
    expected = softmax(chosen) if softmax_over == "chosen" else chosen
    if renormalise:
        expected = expected / expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)  # a few float32 roundings
    if (softmax_over, renormalise) == ("all", False):
        # Else the case would not tell the routers apart.
        assert float(np.max(np.sum(weights, -1))) < 0.99


def test_of_equal_logits_the_lower_expert_is_taken():
    experts, _ = route(jnp.zeros((2, 5), jnp.float32), moe_config(5, 2).rule("float32"))
    np.testing.assert_array_equal(experts, [[0, 1], [0, 1]])


@pytest.mark.parametrize("weight_dtype", ["activation", "float32"])
def test_weights_are_rounded_to_the_activations_dtype_if_the_family_says_so(weight_dtype):
    rule = moe_config(6, 3, weight_dtype=weight_dtype).rule("bfloat16")
    # Under jit: there XLA is free to leave out a cast to bfloat16 and back.
    _, weights = jax.jit(functools.partial(route, rule=rule))(
        jnp.asarray(normal(1, 40, 6), jnp.bfloat16)
    )
    assert weights.dtype == jnp.float32
    fits = np.asarray(weights) == np.asarray(weights.astype(jnp.bfloat16).astype(jnp.float32))
    assert fits.all() == (weight_dtype == "activation")


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="a token cannot go to 5 experts of 4"):
        moe_config(4, 5)


# --- slots and tiles


def test_pairs_are_sorted_by_expert_and_stay_in_order_within_one():
    weights = jnp.asarray([[0.5, 0.1], [0.2, 0.3], [0.6, 0.4]], jnp.float32)
    slots = sort_by_expert(jnp.asarray([[2, 0], [0, 1], [2, 0]], jnp.int32), weights, 4)
    np.testing.assert_array_equal(slots.row, [0, 1, 2, 1, 0, 2])
    # choice · 3 tokens + token
    np.testing.assert_array_equal(slots.out_row, [3 + 0, 1, 3 + 2, 3 + 1, 0, 2])
    np.testing.assert_array_equal(
        slots.weight, np.asarray([0.1, 0.2, 0.4, 0.3, 0.5, 0.6], np.float32)
    )
    np.testing.assert_array_equal(slots.sizes, [3, 1, 2, 0])


def test_padding_is_sorted_behind_everything_and_belongs_to_no_expert():
    valid = jnp.asarray([True, False, True])
    slots = sort_by_expert(
        jnp.asarray([[1, 0], [0, 1], [1, 0]], jnp.int32), jnp.ones((3, 2), jnp.float32), 2, valid
    )
    np.testing.assert_array_equal(slots.sizes, [2, 2])
    np.testing.assert_array_equal(slots.row, [0, 2, 0, 2, 1, 1])


SIZES = [
    [0, 0, 5, 0],  # all tokens to one expert
    [3, 1, 4, 2],
    [8, 0, 16, 1],  # whole tiles
    [0, 0, 0, 0],  # all padding
    [1],
]


@pytest.mark.parametrize("block_m", [1, 4, 8])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tiles_cover_every_slot_once_and_no_empty_expert(sizes, block_m):
    slots = sum(sizes) + 3  # three of padding
    tiles = tile_list(jnp.asarray(sizes, jnp.int32), slots, block_m)
    assert tiles.expert.shape == (tiles_needed(slots, len(sizes), block_m),)
    expected, start = [], 0
    for expert, size in enumerate(sizes):
        for begin in range(start, start + size, block_m):
            expected.append((expert, begin, min(begin + block_m, start + size)))
        start += size
    count = int(tiles.count)
    found = list(zip(*(np.asarray(field)[:count].tolist() for field in tiles[:3]), strict=True))
    assert found == expected
    assert (
        np.asarray(tiles.start[count:]).tolist() == np.asarray(tiles.end[count:]).tolist()
    )  # the rest is empty


# --- grouped products

# sizes, n, k: what e experts get, with padding behind it; i = 192 and h = 576 are no multiples of
# 128.
SHAPES = [
    ([3, 0, 6, 1], 2 * 192, 576),
    ([0, 11, 0, 0], 576, 192),
    ([1, 0], 40, 24),
]


def in_a_loop(x: np.ndarray, w: np.ndarray, slots: Slots) -> np.ndarray:
    """The same slot by slot in float64."""
    sizes, rows, weights = (np.asarray(part) for part in (slots.sizes, slots.row, slots.weight))
    out = np.zeros((len(rows), w.shape[1]))
    for slot, expert in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[slot] = w[expert].astype(np.float64) @ x[rows[slot]].astype(np.float64) * weights[slot]
    return out


def slots_for(sizes: list[int], m: int) -> Slots:
    """The slots of these groups and two more of padding, with random rows and weights."""
    rng, count = np.random.default_rng(7), sum(sizes) + 2
    return Slots(
        jnp.asarray(sizes, jnp.int32),
        row=jnp.asarray(rng.integers(0, m, count), jnp.int32),
        weight=jnp.asarray(rng.uniform(0.1, 1, count), jnp.float32),
    )


@pytest.mark.parametrize("sizes, n, k", SHAPES)
def test_unquantized_rows_meet_their_own_expert(sizes, n, k):
    x, w = normal(0, 5, k), normal(1, len(sizes), n, k)
    slots = slots_for(sizes, 5)
    out = ops.grouped_matmul(jnp.asarray(x), jnp.asarray(w), slots)
    assert close(out, in_a_loop(x, w, slots), 1e-6)  # float32 sums over up to 576 against float64
    assert not np.asarray(out[sum(sizes) :]).any()


def numpy_dequantized(q: fp8jax.QArray) -> np.ndarray:
    """Codes times scales, element by element, float64."""
    codes, scale = np.asarray(q.qvalue, np.float64), np.asarray(q.scale, np.float64)
    _, n, k = codes.shape
    if scale.ndim == 1:
        return codes * scale[:, None, None]
    half = n // q.row_groups
    blocks_a_group = scale.shape[1] // q.row_groups
    row = np.arange(n)
    row_block = row // half * blocks_a_group + row % half // 128
    return codes * scale[:, row_block][:, :, np.arange(k) // 128]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sizes, n, k", SHAPES)
def test_quantized_rows_meet_their_own_expert(sizes, n, k, scheme):
    w = quantized(jnp.asarray(normal(1, len(sizes), n, k)), scheme, row_groups=2)
    x = fp8jax.quantize_activation(jnp.asarray(normal(0, 5, k)), w.scheme.activation)
    slots = slots_for(sizes, 5)
    out = ops.grouped_scaled_matmul(x, w, slots, out_dtype=jnp.float32, implementation="xla")
    x_scale = np.repeat(
        np.asarray(x.scale, np.float64), 128 if scheme == "fp8_per_block" else k, axis=1
    )[:, :k]
    wide = np.asarray(x.qvalue, np.float64) * x_scale
    expected = in_a_loop(wide, numpy_dequantized(w), slots)
    assert close(out, expected, 1e-6)  # the codes are given, so only float32 sums against float64
    assert not np.asarray(out[sum(sizes) :]).any()


def test_mismatched_groups_are_an_error_that_names_the_sizes():
    with pytest.raises(
        ValueError,
        match=r"x \[m, k\] is \(3, 8\), w \[e, n, k\] is \(2, 5, 9\) and sizes \[e\] is \(2,\)",
    ):
        ops.grouped_matmul(jnp.zeros((3, 8)), jnp.zeros((2, 5, 9)), Slots(jnp.zeros(2, jnp.int32)))
    stack = fp8jax.QArray(
        jnp.zeros((2, 8, 8), jnp.float8_e4m3fn), jnp.ones((2, 1, 1)), fp8jax.FP8_PER_BLOCK
    )
    x = fp8jax.QActivation(jnp.zeros((3, 8), jnp.float8_e4m3fn), jnp.ones((3, 1)), "token")
    with pytest.raises(
        ValueError, match="quantized per token, but scheme 'fp8_per_block' wants group"
    ):
        ops.grouped_scaled_matmul(x, stack, Slots(jnp.zeros(2, jnp.int32)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_decode_step_reads_no_expert_that_was_not_routed_to(scheme):
    """Neither in its result (the others' scales are NaN) nor in memory (no copy of the stack, in
    float16 say)."""
    e, n, k = 16, 256, 256
    w = quantized(jnp.asarray(normal(1, e, n, k)), scheme)
    poisoned = fp8jax.QArray(w.qvalue, w.scale.at[:5].set(jnp.nan).at[6:].set(jnp.nan), w.scheme)
    slots = Slots(jnp.zeros(e, jnp.int32).at[5].set(2))
    step = jax.jit(functools.partial(ops.grouped_scaled_matmul, implementation="xla"))
    x = jnp.asarray(normal(0, 2, k))
    assert np.isfinite(step(x, poisoned, slots)).all()
    memory = step.lower(x, w, slots).compile().memory_analysis()
    # 1 MB; one expert in float32 is 0.26 MB, the stack in float16 would be 2 MB.
    assert memory is not None and memory.temp_size_in_bytes < w.nbytes


# --- experts as a whole

E, H, WIDTH = 5, 40, 24


@functools.cache
def experts_of(scheme: fp8jax.Scheme | str | None) -> Experts:
    experts = Experts(moe_config(E, 2, WIDTH), H, dtype="float32")
    gate_up, down = jnp.asarray(normal(1, E, 2 * WIDTH, H)), jnp.asarray(normal(2, E, H, WIDTH))
    if scheme is not None:
        gate_up, down = quantized(gate_up, scheme, row_groups=2), quantized(down, scheme)
    experts.gate_up_proj, experts.down_proj = nnx.data(gate_up), nnx.data(down)
    return experts


@jax.jit
def run(experts: Experts, x, chosen, weights, valid=None):
    return total(experts(x, sort_by_expert(chosen, weights, E, valid), valid=valid))


def token_by_token(x, chosen, weights) -> np.ndarray:
    """The mathematics of the module's text in float64."""
    gate_up, down = (
        np.asarray(w, np.float64)
        for w in (experts_of(None).gate_up_proj, experts_of(None).down_proj)
    )
    out = np.zeros(x.shape)
    for token, row in enumerate(np.asarray(chosen)):
        for choice, expert in enumerate(row):
            gate, up = np.split(gate_up[expert] @ x[token].astype(np.float64), 2)
            out[token] += weights[token, choice] * (
                down[expert] @ (gate / (1 + np.exp(-gate)) * up)
            )
    return out


def routing(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    match kind:
        case "all tokens to two experts":
            return np.tile(np.array([3, 1], np.int32), (9, 1))
        case "one token":
            return np.array([[4, 2]], np.int32)
        case "top_k = e":
            return np.stack([rng.permutation(E) for _ in range(6)]).astype(np.int32)
        case "two experts without tokens":
            return np.stack([rng.permutation([0, 2, 4])[:2] for _ in range(9)]).astype(np.int32)
        case "a big batch":
            return np.stack([rng.permutation(E)[:2] for _ in range(150)]).astype(np.int32)
    raise AssertionError(kind)


KINDS = (
    "all tokens to two experts",
    "one token",
    "top_k = e",
    "two experts without tokens",
    "a big batch",
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weighted_sum_over_experts(kind):
    chosen = routing(kind)
    x, weights = normal(0, len(chosen), H), np.abs(normal(4, *chosen.shape))
    expected = token_by_token(x, chosen, weights)
    assert close(
        run(experts_of(None), jnp.asarray(x), jnp.asarray(chosen), jnp.asarray(weights)),
        expected,
        1e-6,
    )
    for scheme in SCHEMES:
        found = run(experts_of(scheme), jnp.asarray(x), jnp.asarray(chosen), jnp.asarray(weights))
        # e4m3 keeps 4 bits: 2.6 % an operand (the reference page's figure), two products with two
        # operands each
        assert close(found, expected, 0.08) and not close(found, expected, 0.01)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_other_tokens_of_the_batch_change_nothing(scheme):
    chosen = routing("two experts without tokens")
    x, others, weights = normal(0, 9, H), 100 * normal(5, 9, H), np.abs(normal(4, 9, 2))
    others[4] = x[4]
    args = jnp.asarray(chosen), jnp.asarray(weights)
    one, other = (
        run(experts_of(scheme), jnp.asarray(x), *args),
        run(experts_of(scheme), jnp.asarray(others), *args),
    )
    np.testing.assert_array_equal(
        one[4], other[4]
    )  # bit for bit: the routing is the same, so the tile positions are
    assert not np.array_equal(one[3], other[3])


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_permuting_the_batch_permutes_the_outputs(scheme):
    chosen, order = routing("a big batch"), np.random.default_rng(6).permutation(150)
    x, weights = normal(0, 150, H), np.abs(normal(4, 150, 2))
    before = run(experts_of(scheme), jnp.asarray(x), jnp.asarray(chosen), jnp.asarray(weights))
    after = run(
        experts_of(scheme),
        jnp.asarray(x[order]),
        jnp.asarray(chosen[order]),
        jnp.asarray(weights[order]),
    )
    # A row of a product may be summed in another order at another place of a tile. Quantized, that
    # may flip a code, which moves one of 300 rows by a percent.
    assert close(after, np.asarray(before)[order], 1e-6 if scheme is None else 1e-3)


def test_contributions_are_added_in_the_order_of_the_choices():
    chosen = routing("top_k = e")
    x, weights = normal(0, 6, H), (normal(4, 6, E) * 10.0 ** np.arange(E)).astype(np.float32)
    alone = []
    for choice in range(E):
        only = np.where(np.arange(E) == choice, weights, np.float32(0))
        alone.append(
            np.asarray(
                run(experts_of(None), jnp.asarray(x), jnp.asarray(chosen), jnp.asarray(only))
            )
        )
    expected = functools.reduce(np.add, alone)  # float32, left to right
    found = run(experts_of(None), jnp.asarray(x), jnp.asarray(chosen), jnp.asarray(weights))
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(
        expected, functools.reduce(np.add, alone[::-1])
    )  # so the order can be seen


@pytest.mark.parametrize("scheme", [None, *SCHEMES, FP8_PER_TENSOR_WHOLE_BATCH], ids=str)
def test_padding_is_zero_and_touches_no_one(scheme):
    chosen, weights = routing("two experts without tokens"), np.abs(normal(4, 9, 2))
    x, valid = normal(0, 9, H), np.arange(9) % 3 != 1
    poisoned = np.where(valid[:, None], x, np.float32(1e6))
    args = jnp.asarray(chosen), jnp.asarray(weights), jnp.asarray(valid)
    clean, dirty = (
        run(experts_of(scheme), jnp.asarray(x), *args),
        run(experts_of(scheme), jnp.asarray(poisoned), *args),
    )
    np.testing.assert_array_equal(clean, dirty)
    assert not np.asarray(clean)[~valid].any() and np.asarray(clean)[valid].all()
    expected = token_by_token(x, chosen, weights)[valid]
    assert close(
        np.asarray(clean)[valid], expected, 1e-6 if scheme is None else 0.08
    )  # as in the weighted sums above


def test_one_activation_scale_for_the_batch_is_felt_by_all():
    """The explicit recipe "tensor" does what its name says; it is what the test above would miss
    without `valid`."""
    experts = experts_of(FP8_PER_TENSOR_WHOLE_BATCH)
    chosen, weights = (
        jnp.asarray(routing("two experts without tokens")),
        jnp.abs(jnp.asarray(normal(4, 9, 2))),
    )
    x = normal(0, 9, H)
    louder = x.copy()
    louder[0] *= 50
    one, other = (
        run(experts, jnp.asarray(x), chosen, weights),
        run(experts, jnp.asarray(louder), chosen, weights),
    )
    assert not np.array_equal(one[5], other[5])
