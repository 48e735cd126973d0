"""fp8_per_channel from a checkpoint to logits, held against torch.

The logits come from scripts/make_channel_goldens.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_checkpoints import GOLDENS, golden, load, relative_error

import fp8jax

SCHEME = "fp8_per_channel"
with np.load(GOLDENS / "channel.npz") as arrays:
    FROZEN = dict(arrays)


@pytest.mark.parametrize("variant", FROZEN)
def test_logits_equal_torch(variant):
    logits = load(variant, SCHEME).logits(golden(variant)["token_ids"])
    # float32 sums in another order: at most 3.4e-7 was measured. No code flips in these.
    assert relative_error(logits, FROZEN[variant]) < 2e-6
    assert relative_error(golden(variant)["logits"], FROZEN[variant]) > 0.1


def test_every_row_of_every_weight_has_its_own_scale_gate_and_up_of_experts_too():
    lm, unquantized = load("mixtral", SCHEME), load("mixtral")
    for name in ("self_attn.qkv_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        q = lm.weight(f"model.layers.1.{name}")
        w = np.asarray(unquantized.weight(f"model.layers.1.{name}"), np.float64)
        assert isinstance(q, fp8jax.QArray)
        assert q.scale.shape == (*w.shape[:-1], 1)
        np.testing.assert_allclose(q.scale, np.abs(w).max(-1, keepdims=True) / 448, rtol=1e-7)
        # Half a step of 1/8 of a code's value, or half the smallest code.
        error = np.abs(np.asarray(fp8jax.dequantize(q), np.float64) - w)
        assert (error <= np.maximum(np.abs(w) / 16, np.asarray(q.scale) * 2**-10) * 1.001).all()


def test_layers_and_experts_may_have_it_apart():
    folder, token_ids = GOLDENS / "mixtral", golden("mixtral")["token_ids"]
    apart = [
        fp8jax.load_quantized(folder, "online", quantization_config={kind: SCHEME}, dtype="float32")
        for kind in ("linear", "moe")
    ]
    names = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts.down_proj")
    found = [[isinstance(lm.weight(name), fp8jax.QArray) for name in names] for lm in apart]
    assert found == [[True, False], [False, True]]
    for lm in apart:
        assert relative_error(lm.logits(token_ids), golden("mixtral")["logits"]) > 0.05


def test_a_row_of_zeros_stays_zero():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((4, 160)), jnp.bfloat16).at[2].set(0)
    q = fp8jax.quantize(w, SCHEME)
    out = fp8jax.scaled_matmul(jnp.ones((3, 160), jnp.bfloat16), q)
    assert not np.asarray(out[:, 2]).any() and np.isfinite(np.asarray(out, np.float32)).all()
