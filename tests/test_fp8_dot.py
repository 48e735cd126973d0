"""The FP8 dot: what it computes, and that its private hooks into JAX still reach the FP8 tensor
cores.

The last tests are the guard for JAX upgrades: when one fails, the kernels still give right results
but would run at float16 speed on Hopper.
"""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp8jax.pallas_kernels import primitives as module
from fp8jax.pallas_kernels.primitives import fp8_dot


def operands(m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(m + n + k)
    a, b = (rng.normal(size=(rows, k)).astype(ml_dtypes.float8_e4m3fn) for rows in (m, n))
    return a, b, rng.normal(size=(m, n)).astype(np.float32)


def call_in_kernel(a, b, acc, *, promote_every: int | None, interpret: bool, debug: bool = False):
    from jax.experimental import pallas as pl

    def kernel(a_ref, b_ref, acc_ref, out_ref):
        out_ref[...] = fp8_dot(a_ref[...], b_ref[...], acc_ref[...], promote_every=promote_every)

    out = jax.ShapeDtypeStruct(acc.shape, acc.dtype)
    return pl.pallas_call(kernel, out_shape=out, interpret=interpret, debug=debug)(a, b, acc)


@pytest.mark.smoke
@pytest.mark.parametrize("promote_every", [None, 32, 128])
def test_it_adds_a_times_b_transposed_to_the_accumulator(promote_every):
    a, b, acc = operands(16, 32, 64)
    expected = acc + a.astype(np.float64) @ b.astype(np.float64).T
    for out in (
        fp8_dot(jnp.asarray(a), jnp.asarray(b), jnp.asarray(acc), promote_every=promote_every),
        call_in_kernel(
            jnp.asarray(a),
            jnp.asarray(b),
            jnp.asarray(acc),
            promote_every=promote_every,
            interpret=True,
        ),
    ):
        np.testing.assert_allclose(
            np.asarray(out), expected, atol=1e-5
        )  # 64 float32 additions of values around 1


def test_operands_that_do_not_belong_together_are_named():
    a, b, acc = map(jnp.asarray, operands(16, 32, 64))
    with pytest.raises(ValueError, match=r"\(16, 64\), \(64, 32\) and \(16, 32\)"):
        fp8_dot(a, b.T, acc, promote_every=None)
    with pytest.raises(ValueError, match="got bfloat16"):
        fp8_dot(a.astype(jnp.bfloat16), b, acc, promote_every=None)
    with pytest.raises(ValueError, match="promote_every is 16"):
        fp8_dot(a, b, acc, promote_every=16)


def test_importing_the_kernels_does_not_import_pallas():
    """`import fp8jax` reaches these files; Pallas costs another second, which no machine without a
    GPU need spend."""
    program = (
        "import sys, fp8jax.pallas_kernels.scaled_matmul, "
        "fp8jax.pallas_kernels.block_scaled_matmul\nsys.exit('jax.experimental.pallas' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_jax_that_has_moved_the_private_names_is_reported_in_words(monkeypatch):
    from jax._src.pallas.triton import lowering

    monkeypatch.delattr(lowering, "register_lowering")
    module.register_lowerings.cache_clear()
    try:
        a, b, acc = map(jnp.asarray, operands(16, 32, 64))
        with pytest.raises(
            ImportError, match=f"JAX {re.escape(jax.__version__)} no longer has the private names"
        ):
            fp8_dot(a, b, acc, promote_every=None)
    finally:
        monkeypatch.undo()
        module.register_lowerings.cache_clear()


@pytest.mark.smoke
@pytest.mark.parametrize("promote_every, attribute", [(None, 2**30), (128, 64), (32, 32)])
def test_guard_the_triton_dot_carries_the_attribute_that_selects_fp8_instructions(
    promote_every, attribute, capsys
):
    """Needs no CUDA plugin: JAX lowers to Triton IR on any machine. k is 64 here, so that 128 must
    become 64."""
    from jax.sharding import AbstractDevice, AbstractMesh

    mesh = AbstractMesh(
        (1,),
        ("x",),
        abstract_device=AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu"),
    )
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands(64, 64, 64)]
    function = functools.partial(
        call_in_kernel, promote_every=promote_every, interpret=False, debug=True
    )
    with jax.sharding.use_abstract_mesh(mesh):
        jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    printed = capsys.readouterr().out
    assert "tt.dot" in printed, (
        "Pallas no longer prints its Triton module with debug=True; find it another way"
    )
    assert f"maxNumImpreciseAcc = {attribute}" in printed, (
        "the Triton dot has lost maxNumImpreciseAcc: on Hopper the kernels would silently use "
        "float16 instructions"
    )


def dot_program(promote_every: int | None, stock: bool):
    """What the offline tests below compile: four steps of a 64×64×128 dot, ours or the one that
    Pallas has."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    from fp8jax.devtools.offline_compile import Program

    def kernel(a_ref, b_ref, out_ref):
        def step(i, acc):
            a, b = (ref[:, pl.ds(i * 128, 128)] for ref in (a_ref, b_ref))
            return (
                acc + plgpu.dot(a, b.T)
                if stock
                else fp8_dot(a, b, acc, promote_every=promote_every)
            )

        out_ref[...] = jax.lax.fori_loop(0, 4, step, jnp.zeros((64, 64), jnp.float32))

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((64, 64), jnp.float32), name="dot")
    operand = jax.ShapeDtypeStruct((64, 512), jnp.float8_e4m3fn)
    return Program(call, (operand, operand))


@pytest.mark.parametrize(
    "device, kind", [("h100", "wgmma.e4m3"), ("l40", "mma.e4m3"), ("b200", "tcgen05.f8")]
)
def test_guard_the_dot_compiles_to_fp8_instructions(compiler, device, kind):
    report = compiler.compile(
        device, "tests.test_fp8_dot:dot_program", {"promote_every": None, "stock": False}
    )
    kernel = report.kernels["dot"]
    assert kernel.instructions.get(kind), (
        f"no FP8 tensor-core instructions for {device}: {dict(kernel.instructions)}"
    )
    assert kernel.fp8_only


def test_pallas_own_dot_still_falls_back_to_float16_on_hopper(compiler):
    """Why fp8_dot exists. When this fails, Pallas has learnt it and the primitive may go."""
    kernel = compiler.compile(
        "h100", "tests.test_fp8_dot:dot_program", {"promote_every": None, "stock": True}
    ).kernels["dot"]
    assert kernel.instructions.get("mma.f16")
    assert not kernel.fp8_only


def test_promotion_adds_in_float32_on_hopper(compiler):
    def additions(promote_every):
        arguments = {"promote_every": promote_every, "stock": False}
        return (
            compiler.compile("h100", "tests.test_fp8_dot:dot_program", arguments)
            .kernels["dot"]
            .instructions.get("float32 add", 0)
        )

    # 64·64 outputs over 128 threads are 32 a thread, added once every 128, twice every 64 inputs of
    # the step of 128.
    assert (additions(None), additions(128), additions(64)) == (0, 32, 64)
