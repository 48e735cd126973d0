"""Programs to compile offline: one matmul of a given op and shape, for tests and for `scripts/inspect_kernels.py`."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fp8jax.pallas_kernels import matmul_tiles
from fp8jax.pallas_kernels.block_scaled_matmul import block_scaled_matmul_triton
from fp8jax.pallas_kernels.block_scaled_matmul import default_config as default_block_scaled_config
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.offline_compile import Program
from fp8jax.pallas_kernels.scaled_matmul import default_config as default_scaled_config
from fp8jax.pallas_kernels.scaled_matmul import scaled_matmul_triton
from fp8jax.schemes import BLOCK

MatmulOp = Literal["scaled_matmul", "block_scaled_matmul"]

# Outputs n and inputs k of the linear layers of a decoder layer, fused as the models here fuse them.
LINEAR_SHAPES = {
    "llama-3.1-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama-3.1-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}


def matmul(
    op: MatmulOp,
    m: int,
    n: int,
    k: int,
    config: dict[str, Any] | None = None,
    out_dtype: str = "bfloat16",
    bias: bool = False,
    per_channel: bool = False,
    x_scale_layout: Literal["mg", "gm"] = "gm",
) -> Program:
    """One call of a matmul kernel with per-token or 1×128 activation scales.

    Args:
        op: which kernel.
        m, n, k: rows, outputs, inputs.
        config: fields of a `Config`; the default of the device if None.
        out_dtype, bias, x_scale_layout: as the kernel takes them.
        per_channel: one weight scale a channel, for `scaled_matmul`.
    """
    device_kind = matmul_tiles.current_device_kind()
    default = default_scaled_config if op == "scaled_matmul" else default_block_scaled_config
    chosen = Config(**config) if config else default(device_kind, m, n, k)
    groups = -(-k // BLOCK)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x, w = (jax.ShapeDtypeStruct((rows, k), jnp.float8_e4m3fn) for rows in (m, n))
    if op == "scaled_matmul":
        scales = f32((m, 1)), f32((n, 1) if per_channel else (1,))
        kernel = functools.partial(scaled_matmul_triton, out_dtype=jnp.dtype(out_dtype), config=chosen)
    else:
        scales = f32((groups, m) if x_scale_layout == "gm" else (m, groups)), f32((-(-n // BLOCK), groups))
        kernel = functools.partial(
            block_scaled_matmul_triton, out_dtype=jnp.dtype(out_dtype), config=chosen, x_scale_layout=x_scale_layout
        )
    arguments = [x, scales[0], w, scales[1]] + ([jax.ShapeDtypeStruct((n,), jnp.bfloat16)] if bias else [])

    def program(x, x_scale, w, w_scale, bias=None):
        return kernel(x, x_scale, w, w_scale, bias=bias)

    return Program(program, tuple(arguments))
