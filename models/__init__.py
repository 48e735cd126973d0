"""Model families: from a config.json to a `DecoderConfig`. Imported as `fp8jax.models`."""

import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fp8jax.models import (
    granite,
    granitemoe,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen3,
    qwen3_moe,
)
from fp8jax.models.config import DecoderConfig
from fp8jax.models.decoder import CausalLM, Decoder
from fp8jax.models.hf_config import HFConfig, shown

_MODULES = (granite, granitemoe, llama, mistral, mixtral, olmoe, qwen2, qwen3, qwen3_moe)
ARCHITECTURES: dict[str, ModuleType] = {module.FAMILY.architecture: module for module in _MODULES}
"""config.json's `architectures[0]` to the family's page, which has a `FAMILY` and a
`decoder_config`."""
_MODEL_TYPES = {
    module.FAMILY.model_type: architecture for architecture, module in ARCHITECTURES.items()
}

__all__ = ["ARCHITECTURES", "CausalLM", "Decoder", "DecoderConfig", "read_decoder_config"]


def read_decoder_config(
    raw: Mapping[str, Any], *, dtype: str, where: str = "config.json", told: list[str] | None = None
) -> DecoderConfig:
    """The decoder that a config.json describes.

    Args:
        raw: the JSON object.
        dtype: of activations and unquantized weights.
        where: how to call the file in an error.
        told: where to put what the user should know about a file that is read all the same, a
            sentence each; None to warn.
    Raises:
        ValueError: unknown architecture (with the known ones); a field that is wrong, not
            implemented or not known.
    """
    module = ARCHITECTURES[_architecture(raw, where)]
    config = HFConfig(raw, module.FAMILY, where)
    decoder_config = module.decoder_config(config, dtype=dtype)
    config.check_token_ids("bos_token_id", "eos_token_id", "pad_token_id")  # for whoever generates
    config.reject_unread()
    if told is not None:
        told += config.told
    else:
        for sentence in config.told:
            warnings.warn(sentence, stacklevel=2)
    return decoder_config


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    """The family, from `architectures` or, without it, from `model_type`; both must mean the same
    one."""
    listed, model_type = raw.get("architectures"), raw.get("model_type")
    by_type = _MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    silent = listed is None or listed == []
    named = by_type if silent else listed[0] if isinstance(listed, list) else listed
    if not isinstance(named, str) or named not in ARCHITECTURES:
        field, found = ("model_type", model_type) if silent else ("architectures", named)
        raise ValueError(
            f"{where}: {field} {shown(found)} is not implemented; known architectures: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    if model_type is not None and by_type != named:
        expected = ARCHITECTURES[named].FAMILY.model_type
        raise ValueError(
            f"{where}: architectures says {named}, whose model_type is {expected!r}, but "
            f"model_type is {shown(model_type)}, which is what transformers goes by; correct the "
            "one that is wrong"
        )
    return named
