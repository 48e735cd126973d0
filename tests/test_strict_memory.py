"""The checker of the kernel tests: it sees the accesses outside an array that the interpreter
hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strict_memory import strict_memory


@pytest.mark.parametrize(
    ("unmasked", "touched"), [(5, 8), (6, 8), (8, 5)], ids=["sound", "one read", "one write"]
)
def test_a_missing_mask_turns_the_result_into_nan(unmasked, touched):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    def kernel(x_ref, out_ref):
        places = jnp.arange(8)
        values = plgpu.load(
            x_ref.at[places], mask=places < min(unmasked, x_ref.shape[0] + 1), other=0.0
        )
        plgpu.store(out_ref.at[places], values, mask=places < 8)

    def run():
        x, out = jnp.arange(5.0), jax.ShapeDtypeStruct((touched,), jnp.float32)
        return np.asarray(pl.pallas_call(kernel, out_shape=out, interpret=True)(x))

    expected = np.array([0, 1, 2, 3, 4, 0, 0, 0], np.float32)[:touched]
    with strict_memory():
        strict = run()
    if unmasked == 5:
        assert np.array_equal(strict, expected)
    else:
        assert np.isnan(strict).all()
        assert np.isfinite(run()).all()  # the interpreter alone shows nothing
