"""The architecture of a decoder, in numbers and words: what a family makes of its config.json."""

from dataclasses import dataclass
from typing import Literal

from fp8jax.models.rotary_embedding import Rope
from fp8jax.pallas_kernels.expert_routing import Rule


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """What the tensors of an MoE block are called in a checkpoint, below "model.layers.3.".

    Args:
        router: the router's weight `[e, h]`.
        gate_up: names that stack along rows to gate and up. With "{e}" in them, one name of gate
            and one of up an expert; without, one tensor `[e, 2i, h]` of all experts.
        down: the same for down, `[h, i]` an expert or `[e, h, i]`.
    """

    router: str
    gate_up: tuple[str, ...]
    down: str

    @property
    def experts(self) -> str:
        """The name of the experts as a module, "mlp.experts"."""
        return f"{self.router.partition('.')[0]}.experts"


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The experts and the router of a family, see the table in `moe.py`.

    Args:
        num_experts: e.
        top_k: experts a token goes to.
        intermediate_size: width i of an expert.
        softmax_over: "all" or "chosen".
        renormalise: whether the chosen probabilities are divided by their sum.
        weight_dtype: dtype that the weights are rounded to.
        dense_layers: the layers that have an ordinary MLP instead.
        names: how the tensors may be called in a checkpoint, the family's own way first.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    softmax_over: Literal["all", "chosen"]
    renormalise: bool
    weight_dtype: Literal["activation", "float32"]
    names: tuple[ExpertNames, ...]
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"a token cannot go to {self.top_k} experts of {self.num_experts}")

    def rule(self, activation_dtype: str) -> Rule:
        """How logits of this dtype become experts and weights."""
        return Rule(
            top_k=self.top_k,
            softmax_over=self.softmax_over,
            renormalise=self.renormalise,
            weight_dtype=activation_dtype if self.weight_dtype == "activation" else "float32",
        )


@dataclass(frozen=True, kw_only=True)
class NormNames:
    """What the norms of a decoder layer are called; None for one that the family does not have.

    Args:
        before_attention, before_mlp: of the stream that the block reads.
        after_attention, after_mlp: of what the block gives, before it is added to the stream.
    """

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The architecture of a decoder.

    Args:
        attention_scale: multiplies the scores; head_dim ** -0.5 in most families.
        qkv_bias, o_bias, mlp_bias: which projections have one.
        qk_norm: RMSNorm of q and k over each head or over the whole projection, before rope.
        clip_qkv: q, k and v are clipped to ± this.
        windows: a layer's attention window, itself included, None for all; one entry a layer.
        norms: names of a layer's norms.
        moe: experts and router of the layers that have them; None for a dense model.
        tied: lm_head is the embedding table.
        dtype: of activations and unquantized weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope
    rms_norm_eps: float
    attention_scale: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    clip_qkv: float | None = None
    windows: tuple[int | None, ...] = ()
    norms: NormNames = NormNames()
    moe: MoEConfig | None = None
    tied: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    dtype: str = "bfloat16"

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and layer not in self.moe.dense_layers
