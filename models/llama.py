"""The Llama family: Llama 2, 3.x, SmolLM2 and everything else that says `LlamaForCausalLM`."""

from fp8jax.models.decoder import DecoderConfig
from fp8jax.models.hf_config import HFConfig, read_rope


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Llama config.json describes.

    Raises:
        ValueError: a field is missing, has a wrong type, or asks for something that is not implemented.
    Source: transformers 5, models/llama.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", None) or _even_heads(config, hidden, heads)
    bias = "yes" if config.flag("attention_bias", False) else "no"
    activation = config.take("hidden_act", "silu", kind=str)
    if activation not in ("silu", "swish"):
        raise ValueError(f"{config.where}: hidden_act {activation!r} is not implemented; known: silu")
    kv_heads = config.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"{config.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return DecoderConfig(
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size"),
        num_layers=config.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.size("max_position_embeddings"),
        rope=read_rope(config, head_dim=head_dim),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        attention_scale=head_dim**-0.5,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias="yes" if config.flag("mlp_bias", False) else "no",
        tied=config.flag("tie_word_embeddings", False),
        dtype=dtype,
    )


def _even_heads(config: HFConfig, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ValueError(f"{config.where}: hidden_size {hidden} does not divide into num_attention_heads {heads}")
    return hidden // heads
