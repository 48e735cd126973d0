"""generation_config.json: what a checkpoint asks of `generate` where the caller says nothing.

    read      do_sample, temperature, top_k, top_p, min_p, max_new_tokens, max_length, eos_token_id
    neutral   fields about how transformers runs (caches, compilation, what it returns, speculative
              decoding, which changes no distribution): continuations are the same
    the rest  penalties, beams, suppressed tokens, …: not applied. A value that would change what is
              generated is named in one warning when the model is loaded

Sampling happens where `do_sample` is true, else decoding is greedy. Unlike transformers, which
samples among the 50 likeliest tokens where the file says nothing of top_k, fp8jax filters only
where it is told to. `max_length` counts the prompt: it leaves a call what its longest prompt
leaves, as with transformers' padded batches; `max_new_tokens` beats it.

Source: the fields and their neutral values are those of transformers 5.23,
`generation/configuration_utils.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8jax.checkpoints.errors import CheckpointError, shown

DEFAULT_NEW_TOKENS = 128

APPLIED = frozenset(
    "do_sample temperature top_k top_p min_p max_new_tokens max_length eos_token_id".split()
)

NEUTRAL = frozenset(
    """use_cache cache_implementation cache_config max_cache_len low_memory prefill_chunk_size
    compile_config disable_compile continuous_batching_config output_attentions
    output_hidden_states output_scores output_logits return_dict_in_generate pad_token_id
    bos_token_id decoder_start_token_id renormalize_logits use_mtp is_assistant
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind
    target_lookbehind speculation_type transformers_version
    """.split()
)
"""Fields that change no continuation, whatever their value."""

# Fields that are not applied but change nothing at this value; at any "nothing" (null, false, 0,
# empty) where none is given.
_HARMLESS_AT = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "typical_p": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "length_penalty": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "top_h": 1,
}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What the file asks for, checked.

    Args:
        temperature: 0 where the file does not sample.
        top_k: 0 for all tokens.
        max_new_tokens: None where the file has none.
        max_length: tokens a sequence may have, the prompt included; None where the file has none.
        eos_token_ids: tokens that end a row.
        warnings: what is asked for and not done, for people.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def new_tokens(self, longest_prompt: int, context_length: int) -> int:
        """How many tokens a call generates whose longest prompt has so many; below 1 where that
        leaves none.

        What the file does not ask for itself, 128 tokens, is cut to what the context holds.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is not None:
            return min(self.max_length, context_length) - longest_prompt
        return min(DEFAULT_NEW_TOKENS, context_length - longest_prompt)


def read_generation_config(
    raw: Mapping[str, Any], config: Mapping[str, Any], *, where: str = "the checkpoint"
) -> GenerationDefaults:
    """Read generation_config.json.

    Args:
        raw: the file as a dict, {} where there is none.
        config: config.json, whose eos_token_id counts where the file has none.
        where: the folder, for errors and warnings.
    Raises:
        CheckpointError: values of the wrong type or out of range; lists every one by file and
            field.
    """
    faults: list[str] = []
    file = "generation_config.json"

    def number(name: str, nothing: float, high: float, wanted: str) -> float:
        value = raw.get(name)
        if value is None:
            return nothing
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            faults.append(
                f"{file}: {name} is {_repr(value)}, expected {wanted}; correct or remove it"
            )
            return nothing
        return float(value)

    def count(name: str, low: int) -> int | None:
        value = raw.get(name)
        if value is None:
            return None
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not low <= value < 2**31:
            faults.append(
                f"{file}: {name} is {_repr(value)}, expected a whole number from {low} up; correct "
                "or remove it"
            )
            return None
        return int(value)

    samples = raw.get("do_sample")
    if not isinstance(samples, bool | None):
        faults.append(
            f"{file}: do_sample is {_repr(samples)}, expected true or false; correct or remove it"
        )
    # In float32, as it is used: 1e39 would be infinite.
    temperature = number("temperature", 1.0, 3.4e38, "a number from 0 up")
    top_k = count("top_k", -1)
    ends_file = file if "eos_token_id" in raw else "config.json"
    ends = _token_ids(
        raw.get("eos_token_id", config.get("eos_token_id")), f"{ends_file}: eos_token_id", faults
    )
    found = GenerationDefaults(
        temperature=temperature if samples is True else 0.0,
        top_k=max(top_k or 0, 0),  # some files say -1 for all
        top_p=number("top_p", 1.0, 1, "a number from 0 to 1"),
        min_p=number("min_p", 0.0, 1, "a number from 0 to 1"),
        max_new_tokens=count("max_new_tokens", 1),
        max_length=count("max_length", 1),
        eos_token_ids=ends,
        warnings=_warnings(
            raw, f"{where}: {file}", greedy_by_temperature=samples is True and temperature == 0
        ),
    )
    if faults:
        raise CheckpointError.gather(where, faults)
    return found


def _token_ids(value: Any, field: str, faults: list[str]) -> tuple[int, ...]:
    found = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in found:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
            faults.append(
                f"{field} is {_repr(value)}, expected a token id from 0 up, or a list of them; "
                "correct or remove it"
            )
            return ()
    return tuple(found)


def _warnings(raw: Mapping[str, Any], file: str, *, greedy_by_temperature: bool) -> tuple[str, ...]:
    told = []
    if greedy_by_temperature:
        told.append(
            f"{file} has do_sample: true with temperature: 0, which is greedy decoding; remove one "
            "of the two"
        )
    ignored = [name for name, value in raw.items() if not changes_nothing(name, value)]
    if ignored:
        asked = ", ".join(f"{shown(name)}={_repr(raw[name])}" for name in sorted(ignored))
        told.append(
            f"{file} asks for what fp8jax does not apply: {asked}; continuations may differ from "
            "those of transformers"
        )
    return tuple(told)


def changes_nothing(name: str, value: Any) -> bool:
    """Whether a field of generation_config.json at this value is done, or makes no difference to
    any continuation."""
    if name in APPLIED or name in NEUTRAL or name.startswith("_") or value is None:
        return True
    if name in _HARMLESS_AT:
        return value == _HARMLESS_AT[name]
    return value is False or value == 0 or (isinstance(value, Sequence | Mapping) and not value)


def _repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
