"""Reading config.json strictly: every field is understood, known to be harmless, or an error.

A field that nobody reads is how a model comes out as gibberish. A family takes what it knows with `take`;
`reject_unread` then looks at what is left. Both spellings are read, that of transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`) and that of 5 (`rope_parameters`, `dtype`).
"""

from collections.abc import Mapping
from typing import Any, Literal

from fp8jax.rotary_embedding import ROPE_TYPES, Rope

_REQUIRED = object()

# Fields that do not touch the forward pass of inference: bookkeeping, training, token ids, how transformers runs the
# model.
_HARMLESS = frozenset(
    """architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path use_cache bos_token_id
    eos_token_id pad_token_id sep_token_id decoder_start_token_id initializer_range attention_dropout hidden_dropout
    resid_pdrop embd_pdrop attn_pdrop auto_map license max_length min_length do_sample temperature top_k top_p
    is_llama_config unsloth_version unsloth_fixed quantization_config id2label label2id num_labels problem_type
    task_specific_params return_dict output_hidden_states output_attentions output_router_logits router_aux_loss_coef
    router_jitter_noise tokenizer_class chunk_size_feed_forward _attn_implementation_autoset attn_implementation
    _attn_implementation use_return_dict finetuning_task prefix bad_words_ids gradient_checkpointing
    transformers.js_config base_model_tp_plan base_model_pp_plan keys_to_ignore_at_inference loss_type
    num_nextn_predict_layers layer_norm_epsilon_unused repetition_penalty length_penalty num_beams early_stopping
    no_repeat_ngram_size diversity_penalty num_beam_groups typical_p remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
    encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate tf_legacy_loss torchscript
    use_bfloat16 pruned_heads is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder use_mrope""".split()
)
# Fields that would change the mathematics, with the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "clip_qkv": (),
    "norm_topk_prob": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "shared_expert_intermediate_size": (0,),
}


class HFConfig:
    """A config.json with a memory of what was read.

    Args:
        raw: the JSON object.
        where: how to call it in an error, "config.json of …".
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json"):
        self._raw = dict(raw)
        self._read: set[str] = set()
        self.where = where

    def take(self, key: str, default: Any = _REQUIRED, *, kind: type | tuple[type, ...] | None = None) -> Any:
        """The value of a field; null counts as absent.

        Raises:
            ValueError: it is required and absent, or not of the kind.
        """
        self._read.add(key)
        value = self._raw.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.where}: the field {key!r} is missing and this architecture needs it")
            return default
        if kind is not None:
            kinds = kind if isinstance(kind, tuple) else (kind,)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(k.__name__ for k in kinds)
                raise ValueError(f"{self.where}: {key} is {value!r}, expected {wanted}")
        return value

    def size(self, key: str, default: Any = _REQUIRED) -> Any:
        """A field that is a positive integer."""
        value = self.take(key, default, kind=int)
        if value is not None and value < 1:
            raise ValueError(f"{self.where}: {key} is {value}, expected a positive integer")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A field that is a number, as float."""
        value = self.take(key, default, kind=(int, float))
        return value if value is None else float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A field that is true or false."""
        return self.take(key, default, kind=bool)

    def yes_or_no(self, key: str) -> Literal["yes", "no"]:
        """A field that is true or false, as `DecoderConfig` takes it; absent is no."""
        return "yes" if self.flag(key, False) else "no"

    def has(self, key: str) -> bool:
        """Whether the field is there at all, null included."""
        return key in self._raw

    def reject_unread(self) -> None:
        """Raise ValueError for fields that would change the mathematics, or may, and that no one has read."""
        faults = []
        for key, value in self._raw.items():
            if (
                key in self._read
                or key in _HARMLESS
                or value is None
                or value in _NEUTRAL.get(key, (False, "", [], {}))
            ):
                continue
            if key in _NEUTRAL:
                faults.append(f"{key}: {value!r} changes the forward pass and is not implemented for this architecture")
            elif isinstance(value, str):
                continue  # unknown words are remarks; what computes is a number, a switch or a table
            else:
                faults.append(
                    f"{key}: {value!r} is not a field that fp8jax knows; if the model's result does not depend on it, remove it"
                )
        if faults:
            raise ValueError(f"{self.where}: " + "; ".join(faults))


def read_rope(config: HFConfig, *, head_dim: int, default_theta: float = 10000.0) -> Rope:
    """The rope of a config, from either spelling.

    A non-null `rope_scaling` wins over `rope_parameters`; an inner `rope_theta` wins over the one at top level (checked
    against transformers 5.23).
    Raises:
        ValueError: a rope type or a field of it that is not implemented, with the known ones.
    """
    parameters = dict(config.take("rope_parameters", {}, kind=dict))
    scaling = config.take("rope_scaling", None, kind=dict)
    top_theta = config.number("rope_theta", None)
    max_positions = config.size("max_position_embeddings")
    theta = parameters.get("rope_theta") or top_theta or default_theta
    if scaling is not None:
        theta = scaling.get("rope_theta") or theta
        parameters = dict(scaling)
    parameters.pop("rope_theta", None)

    legacy_type, rope_type = parameters.pop("type", None), parameters.pop("rope_type", None)
    rope_type = rope_type or legacy_type or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{config.where}: rope type {rope_type!r} is not implemented; known: {', '.join(ROPE_TYPES)}")
    partial = parameters.pop("partial_rotary_factor", None) or config.number("partial_rotary_factor", 1.0)
    original = config.size("original_max_position_embeddings", None) or parameters.pop(
        "original_max_position_embeddings", None
    )
    parameters.pop("original_max_position_embeddings", None)
    fields: dict[str, Any] = {}
    for key in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
                "mscale_all_dim", "truncate"):  # fmt: skip
        value = parameters.pop(key, None)
        if value is not None:
            fields[key] = value if key == "truncate" else float(value)
    unknown = {key: value for key, value in parameters.items() if value is not None}
    if unknown:
        raise ValueError(f"{config.where}: rope parameters not implemented for rope type {rope_type!r}: {unknown}")
    original = int(original or max_positions)
    if rope_type == "yarn" and "factor" not in fields:
        fields["factor"] = max_positions / original
    if rope_type in ("linear", "llama3") and "factor" not in fields:
        raise ValueError(f"{config.where}: rope type {rope_type!r} needs a factor")
    return Rope(
        rotary_dim=int(head_dim * partial),
        theta=float(theta),
        rope_type=rope_type,
        original_max_position_embeddings=original,
        **fields,
    )
