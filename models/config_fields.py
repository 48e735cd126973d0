"""The fields of config.json that no family computes with: those that change nothing, each with its
reason, and those that change nothing at certain values.

A field belongs here if neither the config class nor the modeling code of transformers lets it touch
the logits of a forward pass, or if it does so only in families that fp8jax has not. What belongs to
one family stands in the family's file.

Source: transformers 5.23, configuration_utils, modeling_rope_utils, masking_utils, cache_utils and
the families' own code.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Neutral:
    """The values at which a field changes nothing.

    Args:
        values: those values; 1 stands for 1.0 too, but not for true.
        otherwise: what to say of any other value, read after "field: value".
        null: whether null counts as one of the values.
    """

    values: tuple[Any, ...] = ()
    otherwise: str = "changes the forward pass and is not implemented for this architecture"
    null: bool = True

    def allows(self, value: Any) -> bool:
        """Whether the field changes nothing at this value."""
        if value is None:
            return self.null
        return any(
            isinstance(value, bool) == isinstance(one, bool) and value == one for one in self.values
        )


_HARMLESS_BY_REASON = {
    "says who wrote the file, with what, or where it lay": """
        transformers_version _name_or_path name_or_path _commit_hash license finetuning_task
        task_specific_params prefix unsloth_version unsloth_fixed is_llama_config
        transformers.js_config""",
    "names Python code in the repository, which is never run: the families' own is followed": """
        auto_map""",
    "was read before, to find the family": "architectures model_type",
    "the tensors carry a dtype each, and load_quantized's own decides what is computed in": """
        dtype torch_dtype use_bfloat16""",
    "is judged when the checkpoint is opened: a quantized one is refused": "quantization_config",
    "token ids and the tokenizer do not enter the forward pass": """
        sep_token_id unk_token_id decoder_start_token_id tokenizer_class""",
    "is used in training only": """
        initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop
        gradient_checkpointing loss_type""",
    "says what transformers returns, or how it runs the same products": """
        use_cache return_dict use_return_dict output_hidden_states output_attentions
        tie_last_hidden_states torchscript attn_implementation _attn_implementation
        _attn_implementation_autoset _attn_implementation_internal experts_implementation
        _experts_implementation _experts_implementation_internal chunk_size_feed_forward
        keys_to_ignore_at_inference base_model_tp_plan base_model_pp_plan base_model_ep_plan
        base_model_fsdp_plan tf_legacy_loss is_decoder""",
    "belongs to a classification head, which a causal model has not": """
        id2label label2id num_labels problem_type classifier_dropout""",
    "is a length of training data or of a tokenizer; the context is max_position_embeddings": """
        seq_length model_max_length""",
    "is a setting of generation, which counts in generation_config.json only": """
        max_length min_length do_sample early_stopping num_beams temperature top_k top_p typical_p
        repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
        forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
        begin_suppress_tokens epsilon_cutoff eta_cutoff encoder_repetition_penalty
        num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
        assistant_lookbehind target_lookbehind num_beam_groups diversity_penalty""",
}

HARMLESS: dict[str, str] = {
    name: reason for reason, names in _HARMLESS_BY_REASON.items() for name in names.split()
}
"""Fields that change nothing in any family, with the reason."""

NEUTRAL: dict[str, Neutral] = {
    # Switches and numbers of other families; a family that computes with one of them takes it, and
    # this entry sleeps.
    "attention_bias": Neutral((False,)),
    "mlp_bias": Neutral((False,)),
    "qkv_bias": Neutral((False,)),
    "use_qk_norm": Neutral((False,)),
    "qk_layernorm": Neutral((False,)),
    "rope_interleaved": Neutral((False,)),
    "use_mrope": Neutral((False,)),
    "position_embedding_type": Neutral(("rope",)),
    "norm_type": Neutral(("rmsnorm",)),
    "hidden_activation": Neutral(("silu",)),
    "activation": Neutral(
        ("swiglu", "silu")
    ),  # Falcon 3 says what its gated MLP is called elsewhere
    "alibi": Neutral((False,)),
    "sliding_window": Neutral(),
    "use_sliding_window": Neutral((False,)),
    "attention_chunk_size": Neutral(),
    "attn_logit_softcapping": Neutral(),
    "final_logit_softcapping": Neutral(),
    "query_pre_attn_scalar": Neutral(),
    "logits_scaling": Neutral((1,)),
    "embedding_multiplier": Neutral((1,)),
    "residual_multiplier": Neutral((1,)),
    "attention_multiplier": Neutral(),
    "clip_qkv": Neutral(),
    "norm_topk_prob": Neutral((False,)),
    "decoder_sparse_step": Neutral((1,)),
    "mlp_only_layers": Neutral(([],)),
    "shared_expert_intermediate_size": Neutral((0,)),
    "num_nextn_predict_layers": Neutral((0,)),
    "pretraining_tp": Neutral((1,)),
    "router_jitter_noise": Neutral((0,)),
    # What transformers does with any model.
    "is_causal": Neutral(
        (True,),
        "lets tokens see those after them, as models for embeddings do; fp8jax computes causal "
        "attention only",
        null=False,  # transformers takes null for false here
    ),
    "kv_sharing_modes": Neutral((), "lets layers share keys and values, which is not implemented"),
    "per_layer_config": Neutral(
        ({},), "gives single layers numbers of their own, which is not implemented"
    ),
    "transformers_weights": Neutral(
        (),
        "names another file of weights than model.safetensors; put those weights there, and "
        "remove the field",
    ),
    "configuration_files": Neutral(
        ([],), "points to another configuration file; rename that one to config.json"
    ),
    "is_encoder_decoder": Neutral(
        (False,), "is for models with an encoder; fp8jax runs decoders only"
    ),
    "add_cross_attention": Neutral(
        (False,), "is for models with an encoder; fp8jax runs decoders only"
    ),
    "cross_attention_hidden_size": Neutral(
        (), "is for models with an encoder; fp8jax runs decoders only"
    ),
    "tie_encoder_decoder": Neutral(
        (False,), "is for models with an encoder; fp8jax runs decoders only"
    ),
    "pruned_heads": Neutral(({},), "takes heads out of layers, which is not implemented"),
}
"""Fields that change nothing at the values given. Families add to them, or take the field
itself."""
