"""Stacks of experts that kernels cannot address as one array are cut along their rows, and nobody
notices.

No machine of the tests holds a stack of 2 GiB, so the limit is lowered; what the true limit does
shows on abstract arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_checkpoints import GOLDENS, golden, relative_error
from selection import mostly_slow

import fp8jax
from fp8jax import qarray
from fp8jax.device import H100
from fp8jax.models.moe import SparseMoE
from fp8jax.ops import experts
from fp8jax.pallas_kernels import grouped_matmul
from fp8jax.pallas_kernels.formats import WEIGHTS
from fp8jax.pallas_kernels.grouped_matmul import Slots
from fp8jax.qarray import SplitQArray, rows_of_parts, split_rows
from fp8jax.schemes import Scheme

CHANNEL = Scheme(name="fp8_per_channel", weight="channel", activation="token")


@pytest.mark.parametrize(
    "shape, row_groups, rows",
    [
        ((8, 2 * 16384, 6144), 2, (32768,)),  # Mixtral-8x22B: 1.6 GB stay whole
        ((20, 2 * 10752, 6144), 2, (10752, 10752)),  # gate and up apart
        ((16, 6144, 25000), 1, (3072, 3072)),
        ((160, 1000, 16000), 1, (384, 384, 232)),  # whole blocks
        ((128, 2 * 8192, 5120), 2, (16384,)),  # beyond 4 GiB offsets are 64-bit
    ],
)
def test_stacks_of_two_to_four_gib_are_cut_where_blocks_end(shape, row_groups, rows):
    assert rows_of_parts(shape, WEIGHTS["block"], row_groups=row_groups) == rows
    assert sum(rows) == shape[1]
    assert not any(qarray.unaddressable(shape[0] * count * shape[2]) for count in rows)


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "fp8_per_block", CHANNEL], ids=str)
@pytest.mark.parametrize(
    "n, row_groups, rows", [(2 * 200, 2, (200, 200)), (300, 1, (128, 128, 44))]
)
@pytest.mark.parametrize("experts", [(), (3,)], ids=["one expert", "a stack"])
def test_parts_have_the_codes_and_scales_of_the_whole(scheme, n, row_groups, rows, experts):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(*experts, n, 260)), jnp.float32)
    whole = fp8jax.quantize(weight, scheme, row_groups=row_groups)
    split = jax.jit(split_rows, static_argnums=1)(whole, rows)
    assert (split.shape, split.rows, split.scheme) == (whole.shape, rows, whole.scheme)
    for part in split.parts:
        part.validate()
    dequantized = [np.asarray(fp8jax.dequantize(part)) for part in split.parts]
    np.testing.assert_array_equal(np.concatenate(dequantized, axis=-2), fp8jax.dequantize(whole))
    joined = split.joined()
    assert joined.row_groups == row_groups
    np.testing.assert_array_equal(
        np.asarray(joined.qvalue).view(np.uint8), np.asarray(whole.qvalue).view(np.uint8)
    )
    np.testing.assert_array_equal(joined.scale, whole.scale)


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(qarray, "unaddressable", lambda size: size > 1000)


def is_split(lm: fp8jax.LanguageModel) -> bool:
    block = lm.model.model.layers[-1].mlp
    assert isinstance(block, SparseMoE)
    return isinstance(
        block.experts.gate_up_proj, SplitQArray
    )  # down has fewer rows than a block in these models


@pytest.mark.parametrize(
    "variant, scheme",
    mostly_slow(  # experts one by one, and stacked in the file
        [("mixtral", "fp8_per_block"), ("granitemoe", "fp8_per_tensor")],
        quick=[("mixtral", "fp8_per_block")],
    ),
)
@pytest.mark.slow
def test_a_checkpoint_loads_in_parts_and_gives_the_same(variant, scheme, request):
    load = functools.partial(fp8jax.load_quantized, GOLDENS / variant, scheme, dtype="float32")
    whole = load()
    request.getfixturevalue("small_limit")
    split = load()
    assert is_split(split) and not is_split(whole)
    assert (
        split.report.bytes_after >= whole.report.bytes_after
    )  # a scale for the stack is one for each part
    for stack in ("gate_up_proj", "down_proj"):
        one, other = (lm.weight(f"model.layers.0.mlp.experts.{stack}") for lm in (whole, split))
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other
        )
    tokens = golden(variant)["token_ids"][:, :8].tolist()
    expected = whole.logits(tokens)
    # The products of fewer rows may be summed in another order; float32.
    assert relative_error(split.logits(tokens), expected) < 1e-5


@pytest.mark.parametrize(
    "scheme, row_groups, rows",
    [
        ("fp8_per_tensor", 2, (96, 96)),
        ("fp8_per_block", 2, (96, 96)),
        ("fp8_per_block", 1, (128, 64)),
    ],
)
def test_parts_run_in_kernels(scheme, row_groups, rows):
    rng = np.random.default_rng(1)
    stack = jnp.asarray(rng.normal(size=(3, 192, 160)), jnp.float32)
    whole = fp8jax.quantize(stack, scheme, row_groups=row_groups)
    x = jnp.asarray(rng.normal(size=(16, 160)), jnp.float32)
    slots = Slots(
        jnp.asarray([5, 0, 9], jnp.int32), out_row=jnp.asarray(rng.permutation(16), jnp.int32)
    )
    one, other = (
        experts.grouped_scaled_matmul(x, w, slots, implementation="triton_interpreted")
        for w in (whole, split_rows(whole, rows))
    )
    np.testing.assert_array_equal(one, other)


def test_each_part_of_a_real_one_has_a_kernel_where_the_whole_has_none():
    e, n, k = 20, 2 * 10752, 6144
    assert "split the stack" in (grouped_matmul.why_not(H100, 1, e, n, k) or "")
    abstract = jax.eval_shape(
        lambda w: split_rows(fp8jax.quantize(w, "fp8_per_block", row_groups=2), (n // 2, n // 2)),
        jax.ShapeDtypeStruct((e, n, k), jnp.bfloat16),
    )
    assert abstract.shape == (e, n, k)
    for part in abstract.parts:
        assert grouped_matmul.why_not(H100, 1, *part.shape) is None
        assert part.row_groups == 1
