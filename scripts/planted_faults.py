"""The faults that `mutate.py` plants: each a slip of the pen in one line, each with the tests that
should notice.

Together they touch every room of the library: what calls the kernels, the layers, the router,
sampling and the loop around it, quantization, the reader and what places its tensors. A test file
is named as a whole where several of its tests see the fault; pytest stops at the first.
"""

from dataclasses import dataclass
from pathlib import Path

_KERNELS = "tests/test_ops_choice.py::test_interpreted_kernels_decode_like_xla"
_DENSE, _FAMILIES, _MOE = (
    f"tests/test_{name}_goldens.py::test_float32_logits_equal_torch"
    for name in ("llama", "families", "moe")
)
_DRAWS = "tests/test_generation.py::test_draws_follow_the_filtered_distribution"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One exchange of text.

    Args:
        name: what is wrong then.
        file: where, below the checkout.
        old: found exactly once in the file.
        new: what stands there instead.
        tests: pytest's arguments for the tests that should fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def plant(self, checkout: Path) -> None:
        """Exchange the text in a checkout.

        Raises:
            RuntimeError: the text is not there exactly once.
        """
        path = checkout / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise RuntimeError(
                f"fault {self.name!r}: {self.old!r} is {text.count(self.old)} times in {self.file}"
            )
        path.write_text(text.replace(self.old, self.new))


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name=name, file=file, old=old, new=new, tests=tests)


FAULTS = (
    # What calls the kernels: only a model that runs them, interpreted, can notice.
    _fault("kernel: epsilon of the norm a hundred times too large", "fp8jax/ops/norm.py",
           "            epsilon=epsilon,\n            residual=",
           "            epsilon=100 * epsilon,\n            residual=",
           f"{_KERNELS}[llama31-fp8_per_tensor]"),
    _fault("kernel: residual branch shrunk by 3 %", "fp8jax/ops/norm.py",
           "residual_multiplier=stream.multiplier,",
           "residual_multiplier=0.97 * stream.multiplier,",
           f"{_KERNELS}[llama31-fp8_per_block]"),
    _fault("kernel: attention window one key too wide", "fp8jax/ops/attention.py",
           "            window=window,\n            scale_layout",
           "            window=window and window + 1,\n            scale_layout",
           f"{_KERNELS}[mistral-fp8_per_block]"),
    _fault("kernel: new token not rotated", "fp8jax/ops/attention.py",
           "        rows_or_parts(qkv),\n        cos,\n        sin,",
           "        rows_or_parts(qkv),\n        cos * 0 + 1,\n        sin * 0,",
           f"{_KERNELS}[llama31-None]"),
    _fault("kernel: norms of q and k exchanged", "fp8jax/ops/attention.py",
           "q_norm=q_norm,\n        k_norm=k_norm,", "q_norm=k_norm,\n        k_norm=q_norm,",
           f"{_KERNELS}[qwen3_moe-fp8_per_tensor]"),
    _fault("kernel: bias dropped", "fp8jax/ops/matmul.py",
           '{"bias": bias, "config": config', '{"bias": None, "config": config',
           f"{_KERNELS}[llama_bias_headdim-fp8_per_tensor]"),
    _fault("kernel: attention forgets the new token", "models/attention.py",
           "            positions + 1,\n", "            jnp.maximum(positions, 1),\n",
           f"{_KERNELS}[llama31-None]"),
    _fault("kernel: experts' results not weighted", "fp8jax/ops/experts.py",
           "        w.scale,\n        slots,\n        out_dtype",
           "        w.scale,\n        replace(slots, weight=None),\n        out_dtype",
           f"{_KERNELS}[granitemoe-fp8_per_block]"),
    _fault("kernel: channel scales of the first expert for all",
           "pallas_kernels/grouped_matmul_kernel.py",
           "of_columns = w_scale[tile.expert, jnp", "of_columns = w_scale[0 * tile.expert, jnp",
           f"{_KERNELS}[mixtral-fp8_per_channel]"),
    # Layers, on every device.
    _fault("epsilon of the norm a hundred times too large", "pallas_kernels/rms_norm_quantize.py",
           "(wide * lax.rsqrt(mean_square + jnp.float32(epsilon)))",
           "(wide * lax.rsqrt(mean_square + jnp.float32(100 * epsilon)))",
           _DENSE),
    _fault("residual branch shrunk by 3 %", "fp8jax/ops/values.py",
           "times(total(self.owed), self.multiplier)",
           "times(total(self.owed), 0.97 * self.multiplier)", _DENSE),
    _fault("gate and up exchanged in the activation", "pallas_kernels/silu_mul_quantize.py",
           "    gate, up = jnp.split(gate_up.astype", "    up, gate = jnp.split(gate_up.astype",
           _DENSE),
    _fault("attention window one key too wide", "pallas_kernels/attention.py",
           "visible &= key_positions > positions", "visible &= key_positions >= positions",
           _FAMILIES),
    _fault("attention scores not scaled", "pallas_kernels/attention.py",
           "scores * jnp.float32(scale),", "scores * jnp.float32(1),", _DENSE),
    _fault("query heads dealt to the wrong key-value heads", "pallas_kernels/attention.py",
           "grouped = q.reshape(b, kv_heads, h // kv_heads, t, d)",
           "grouped = q.reshape(b, h // kv_heads, kv_heads, t, d).swapaxes(1, 2)", _DENSE),
    _fault("rotation turns the other way", "pallas_kernels/rope_cache.py",
           "[x1 * cos - x2 * sin, x2 * cos + x1 * sin]",
           "[x1 * cos + x2 * sin, x2 * cos - x1 * sin]", _DENSE),
    _fault("yarn without its attention factor", "models/rotary_embedding.py",
           "multiplier = jnp.float32(rope.multiplier())", "multiplier = jnp.float32(1)", _DENSE),
    _fault("bias dropped", "fp8jax/ops/matmul.py",
           "    if bias is None:\n        return out", "    if True:\n        return out", _DENSE),
    _fault("logits not divided", "models/decoder.py",
           "if self.config.logits_divisor != 1:", "if self.config.logits_divisor == 0:", _FAMILIES),
    # The router and the experts.
    _fault("chosen experts' weights not renormalised", "pallas_kernels/expert_routing.py",
           "    if rule.renormalise:", "    if not rule:", _MOE),
    _fault("softmax over all experts instead of the chosen", "pallas_kernels/expert_routing.py",
           '    if rule.softmax_over == "chosen":\n        strongest',
           '    if rule.softmax_over == "picked":\n        strongest', _MOE),
    _fault("weights of other slots", "pallas_kernels/expert_routing.py",
           "weight=weights.reshape(-1)[pair]", "weight=weights.reshape(-1)", _MOE),
    _fault("padding goes to experts", "pallas_kernels/expert_routing.py",
           "    if valid is not None:\n        experts = jnp.where",
           "    if False:\n        experts = jnp.where",
           "tests/test_moe.py::test_padding_is_sorted_behind_everything_and_belongs_to_no_expert"),
    _fault("a family's norm behind attention left out", "models/decoder.py",
           "return x if name is None else self._norm(name)(x)", "return x",
           "tests/test_decoder.py"),
    # Choosing tokens, and the loop around it.
    _fault("top-p without renormalising after top-k", "fp8jax/sampling.py",
           "jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)",
           "jax.nn.softmax(ranked, axis=-1)", _DRAWS),
    _fault("top-k keeps one too many", "fp8jax/sampling.py", "(rank < top_k)", "(rank <= top_k)",
    _DRAWS),
    _fault("temperature ignored", "fp8jax/sampling.py", "keepdims=True)) / temperature",
    "keepdims=True)) / 1.0", _DRAWS),
    _fault("the same noise at every step", "fp8jax/sampling.py",
           "jax.random.fold_in(own, row)), step)", "jax.random.fold_in(own, row)), step * 0)",
           "tests/test_generation.py::test_every_step_of_a_row_draws_anew"),
    _fault("decoding writes one place too far", "fp8jax/generation.py",
           "jnp.maximum(state.lengths + state.step - 1, 0)",
           "jnp.maximum(state.lengths + state.step, 0)",
           "tests/test_llama_goldens.py::test_greedy_tokens_equal_torch"),
    _fault("an end token ends nothing", "fp8jax/generation.py",
    "active & ~is_end(tokens, eos_token_ids)",
           "active", "tests/test_generation.py::test_an_end_token_ends_its_own_row_only"),
    # Quantization.
    _fault("blocks without the floor of their amax", "pallas_kernels/formats.py",
           "amax_floor=1e-4", "amax_floor=1e-5",
           "tests/test_qarray.py::test_a_block_below_the_floor_is_quantized_against_the_floor"),
    _fault("scale transposed within experts", "fp8jax/qarray.py",
           "rows = scale.reshape(*experts, groups, -1, scale.shape[-1])",
           "rows = scale.reshape(*experts, -1, groups, scale.shape[-1]).swapaxes(-3, -2)",
           "tests/test_qarray.py",
           "tests/test_moe.py::test_quantized_rows_meet_their_own_expert"),
    _fault("activation scale with the floor of vLLM's eager kernel", "pallas_kernels/quantize.py",
           "SCALE_FLOOR = 1.0 / (E4M3_MAX * 512.0)", "SCALE_FLOOR = 2.23e-13",
           "tests/test_activation_quantization.py"),
    _fault("block scale of the row before", "pallas_kernels/block_scaled_matmul.py",
           "w_scale[numbers // BLOCK]", "w_scale[jnp.maximum(numbers - 1, 0) // BLOCK]",
           "tests/test_widened_dot.py"),
    # Reading and loading.
    _fault("a hole between tensors is accepted", "fp8jax/checkpoints/safetensors_file.py",
           "if info.begin != reached:", "if info.begin < reached:",
           "tests/test_safetensors_file.py"),
    _fault("offsets counted from the length field", "fp8jax/checkpoints/safetensors_file.py",
           "data_start = 8 + len(header)", "data_start = len(header)",
           "tests/test_safetensors_file.py"),
    _fault("experts in another order", "fp8jax/checkpoints/parameters.py",
           "first = expert * groups", "first = (self.shape[0] - 1 - expert) * groups", _MOE),
    _fault("gate and up exchanged on the way in", "fp8jax/checkpoints/parameters.py",
           "for source, shape in self.sources[first : first + groups]\n",
           "for source, shape in self.sources[first : first + groups][::-1]\n", _MOE),
    _fault("a replaced file goes unnoticed", "fp8jax/loading.py",
    "        checkpoint.verify_unchanged()\n", "",
           "tests/test_filling.py::test_a_checkpoint_that_is_replaced_while_it_loads_is_an_error"),
)  # fmt: skip
