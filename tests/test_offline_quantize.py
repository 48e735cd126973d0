"""The kernels around the matmuls as compiled for GPUs that are not here: nothing spilled, nothing
copied, few launches.

Widths of Llama-3.1-8B and -70B, one row and many. The programs below are compiled in a child
process, which imports this file.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from fp8jax.devtools.offline_compile import Program
from fp8jax.devtools.offline_targets import TARGETS
from fp8jax.pallas_kernels.block_scaled_matmul import block_scaled_matmul_partials
from fp8jax.pallas_kernels.decode_attention import (
    decode_attention_quantize_triton,
    decode_attention_triton,
)
from fp8jax.pallas_kernels.quantize import quantize_activation_triton
from fp8jax.pallas_kernels.rms_norm_quantize import rms_norm_quantize_triton
from fp8jax.pallas_kernels.rope_cache import rope_cache_triton
from fp8jax.pallas_kernels.scaled_matmul import scaled_matmul_partials
from fp8jax.pallas_kernels.silu_mul_quantize import silu_mul_quantize_triton

DEVICES = ("h100", "b200", "l40")
GRANULARITIES = ("token", "group")
LLAMA_8B = {"hidden": 4096, "inner": 14336, "h": 32, "kv_heads": 8, "d": 128}
LLAMA_70B = {"hidden": 8192, "inner": 28672, "h": 64, "kv_heads": 8, "d": 128}

bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
e4m3 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float8_e4m3fn)


def quantizers(m: int, model: dict, granularity: str, splits: int) -> Program:
    """All three quantizing kernels; with splits, the fused ones take partial sums."""
    hidden, inner = model["hidden"], model["inner"]
    layout = {"scale_layout": "gm", "dtype": "bfloat16"}

    def program(x, x_or_parts, residual, weight, gate_up_or_parts):
        return (
            quantize_activation_triton(x, granularity, scale_layout="gm"),
            rms_norm_quantize_triton(
                x_or_parts, weight, granularity, epsilon=1e-5, residual=residual, **layout
            ),
            silu_mul_quantize_triton(gate_up_or_parts, granularity, **layout),
        )

    given = f32 if splits else bf16
    leading = (splits, m) if splits else (m,)
    shapes = (bf16((m, hidden)), given((*leading, hidden)), bf16((m, hidden)), bf16((hidden,)))
    return Program(program, (*shapes, given((*leading, 2 * inner))))


def attention(
    b: int, model: dict, s: int, dtype: str, granularity: str | None, window: int | None = None
) -> Program:
    def program(q, k, v, lengths):
        arguments = {"scale": 0.1, "window": window}
        if granularity is None:
            return decode_attention_triton(q, k, v, lengths, **arguments)
        return decode_attention_quantize_triton(q, k, v, lengths, granularity, **arguments)

    floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    cache = floats((b, model["kv_heads"], s, model["d"]))
    return Program(program, (floats((b, model["h"], model["d"])), cache, cache, i32((b,))))


def rope(b: int, model: dict, s: int, norm: bool, rotary_dim: int, donated: bool) -> Program:
    h, kv_heads, d = model["h"], model["kv_heads"], model["d"]

    def program(qkv, cos, sin, key_cache, value_cache, positions, *norms):
        options = dict(zip(("q_norm", "k_norm"), norms, strict=False))
        return rope_cache_triton(
            qkv, cos, sin, key_cache, value_cache, positions, epsilon=1e-6, **options
        )

    angles, cache = f32((b, rotary_dim // 2)), bf16((b, kv_heads, s, d))
    norms = (bf16((d,)),) * 2 if norm else ()
    arguments = (bf16((b, (h + 2 * kv_heads) * d)), angles, angles, cache, cache, i32((b,)), *norms)
    return Program(program, arguments, (3, 4) if donated else ())


def decode_layers(b: int, model: dict, s: int, granularity: str, layers: int) -> Program:
    """Decoder layers of a decode step, written with kernels only: split-K sums are left to the
    kernel that follows."""
    hidden, inner, h, kv_heads, d = (
        model[name] for name in ("hidden", "inner", "h", "kv_heads", "d")
    )
    shapes = (
        (hidden + 2 * kv_heads * d, hidden),
        (hidden, h * d),
        (2 * inner, hidden),
        (hidden, inner),
    )

    def matmul(x, scale, w, w_scale):
        if granularity == "token":
            return scaled_matmul_partials(x, scale, w, w_scale)
        return block_scaled_matmul_partials(x, scale, w, w_scale, x_scale_layout="gm")

    def norm(x, weight, stream):
        return rms_norm_quantize_triton(
            x,
            weight,
            granularity,
            epsilon=1e-5,
            residual=stream,
            dtype="bfloat16",
            scale_layout="gm",
        )

    def program(x, weights, caches, cos, sin, lengths):
        stream, after = None, []
        for (qkv, o, gate_up, down), norm_weights, (key_cache, value_cache) in zip(
            *weights, caches, strict=True
        ):
            stream, codes, scale = norm(x, norm_weights[0], stream)
            parts = matmul(codes, scale, *qkv)
            q, key_cache, value_cache = rope_cache_triton(
                parts, cos, sin, key_cache, value_cache, lengths - 1, dtype="bfloat16"
            )
            after.append((key_cache, value_cache))
            codes, scale = decode_attention_quantize_triton(
                q, key_cache, value_cache, lengths, granularity, scale=d**-0.5, scale_layout="gm"
            )
            stream, codes, scale = norm(matmul(codes, scale, *o), norm_weights[1], stream)
            codes, scale = silu_mul_quantize_triton(
                matmul(codes, scale, *gate_up), granularity, dtype="bfloat16", scale_layout="gm"
            )
            x = matmul(codes, scale, *down)
        return x, stream, after

    def quantized(n, k):
        return e4m3((n, k)), f32((1,) if granularity == "token" else (n // 128, k // 128))

    linears = [[quantized(n, k) for n, k in shapes] for _ in range(layers)]
    norms = [(bf16((hidden,)), bf16((hidden,))) for _ in range(layers)]
    caches = [(bf16((b, kv_heads, s, d)), bf16((b, kv_heads, s, d))) for _ in range(layers)]
    angles = f32((b, d // 2))
    return Program(
        program, (bf16((b, hidden)), (linears, norms), caches, angles, angles, i32((b,))), (2,)
    )


def assert_sound(report, device):
    """No spills, and what waits for memory waits in asynchronous copies of 16 bytes."""
    for kernel in report.kernels.values():
        assert kernel.spill_bytes == 0, kernel
        assert set(kernel.copy_widths) <= {"16"}, kernel
        assert kernel.shared_bytes <= TARGETS[device].shared_per_block, kernel
        assert kernel.blocks_per_sm >= 1, kernel


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantizing_kernels_of_llama_spill_nothing(compiler, device, granularity):
    for m, model, splits in [
        (1, LLAMA_8B, 0),
        (4096, LLAMA_8B, 0),
        (1, LLAMA_70B, 4),
        (16, LLAMA_70B, 0),
    ]:
        arguments = {"m": m, "model": model, "granularity": granularity, "splits": splits}
        report = compiler.compile(device, f"{__name__}:quantizers", arguments)
        names = [
            f"{name}_{granularity}"
            for name in ("quantize", "rms_norm_quantize", "silu_mul_quantize")
        ]
        assert sorted(report.launches) == sorted(names)
        assert_sound(report, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("arguments", "second_kernel"),
    [
        (
            {"b": 1, "model": LLAMA_8B, "dtype": "bfloat16", "granularity": None},
            "decode_attention_merge",
        ),
        (
            {
                "b": 1,
                "model": LLAMA_8B,
                "dtype": "bfloat16",
                "granularity": "token",
                "window": 4096,
            },
            None,
        ),
        ({"b": 1, "model": LLAMA_70B, "dtype": "bfloat16", "granularity": "group"}, None),
        ({"b": 1, "model": LLAMA_70B, "dtype": "bfloat16", "granularity": "token"}, None),
        ({"b": 4, "model": LLAMA_8B | {"d": 64}, "dtype": "float16", "granularity": "group"}, None),
        (
            {"b": 2, "model": LLAMA_8B | {"d": 256}, "dtype": "float32", "granularity": None},
            "decode_attention_merge",
        ),
    ],
)
def test_decode_attention_is_pipelined_and_two_kernels(compiler, device, arguments, second_kernel):
    report = compiler.compile(device, f"{__name__}:attention", {"s": 8192, **arguments})
    second_kernel = second_kernel or f"decode_attention_merge_quantize_{arguments['granularity']}"
    assert report.launches == ("decode_attention", second_kernel)
    assert_sound(report, device)
    attend = report.kernels["decode_attention"]
    assert attend.copy_widths["16"] > 0
    kind = {"bfloat16": "mma.bf16", "float16": "mma.f16", "float32": None}[arguments["dtype"]]
    tensor_core = {name for name in attend.instructions if "." in name}
    assert tensor_core == ({kind} if kind else set())  # float32 stays float32: no TF32 instruction


@pytest.mark.parametrize("device", DEVICES)
def test_attention_of_many_rows_is_one_kernel(compiler, device):
    arguments = {"b": 64, "model": LLAMA_8B, "s": 8192, "dtype": "bfloat16", "granularity": None}
    report = compiler.compile(device, f"{__name__}:attention", arguments)
    assert report.launches == ("decode_attention",)
    assert report.bytes_by_use["temporary"] == 0
    assert_sound(report, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("model", "norm", "rotary_dim"),
    [(LLAMA_8B, False, 128), (LLAMA_8B, True, 128), (LLAMA_8B | {"d": 80}, False, 32)],
)
def test_rope_and_cache_write_touch_a_donated_cache_in_place(
    compiler, device, model, norm, rotary_dim
):
    arguments = {"b": 16, "model": model, "s": 8192, "norm": norm, "rotary_dim": rotary_dim}
    cache_bytes = 16 * model["kv_heads"] * 8192 * model["d"] * 2
    report = compiler.compile(device, f"{__name__}:rope", {**arguments, "donated": True})
    assert report.launches == ("rope_cache",)
    assert report.bytes_by_use["temporary"] == 0
    assert report.bytes_by_use["aliased"] == 2 * cache_bytes
    assert_sound(report, device)


def test_a_cache_that_is_not_donated_is_copied_and_that_is_seen(compiler):
    """The check above can fail."""
    arguments = {
        "b": 16,
        "model": LLAMA_8B,
        "s": 8192,
        "norm": False,
        "rotary_dim": 128,
        "donated": False,
    }
    report = compiler.compile("h100", f"{__name__}:rope", arguments)
    copied = report.buffers_of_at_least(16 * 8 * 8192 * 128 * 2)
    assert len(copied) == 2, report.buffers
    assert all(buffer.opcode.startswith("copy") for buffer in copied)


@pytest.mark.parametrize(
    ("device", "b", "granularity"),
    [("h100", 1, "token"), ("h100", 16, "group"), ("l40", 1, "group"), ("b200", 16, "token")],
)
def test_a_decode_step_has_ten_kernels_a_layer_and_copies_nothing(compiler, device, b, granularity):
    arguments = {"b": b, "model": LLAMA_8B, "s": 8192, "granularity": granularity, "layers": 2}
    report = compiler.compile(device, f"{__name__}:decode_layers", arguments)
    # The smallest weight is o_proj's; one layer's side of the cache is as large at b = 1.
    weight_bytes = 4096 * 4096
    assert not report.buffers_of_at_least(weight_bytes)
    kernels = [name for name in report.launches if name in report.kernels]
    ours = (
        "rms_norm",
        "scaled_matmul",
        "block_scaled",
        "rope_cache",
        "decode_attention",
        "silu_mul",
        "quantize_",
    )
    foreign = [name for name in report.launches if not name.startswith(ours)]
    assert len([name for name in kernels if name.startswith(ours)]) == 20, report.launches
    assert len(foreign) <= 1, report.launches  # lengths − 1, for all layers
    assert report.bytes_by_use["temporary"] < 8 * 2**20
    assert_sound(report, device)
