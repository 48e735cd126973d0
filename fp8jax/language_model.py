"""LanguageModel: a loaded model with its tokenizer and configuration; text or token ids in, text or logits out.

The model itself is `lm.model`, a plain pytree. This class keeps the host's side: it turns prompts into padded arrays of
few different shapes, holds the compiled functions, and turns tokens into text. Weights go into the compiled functions
as pre-flattened leaves, since flattening an NNX module costs milliseconds a call.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.generation import bucket, decode_step, generate, prefill
from fp8jax.generation_config import GenerationDefaults, read_generation_config
from fp8jax.load_report import LoadReport
from fp8jax.models import CausalLM
from fp8jax.qarray import QArray, SplitQArray
from fp8jax.sampling import Sampling, sample
from fp8jax.tokenizer import FolderTokenizer, TextStream, render_chat

Prompt = str | Sequence[int]


class _WhenRead:
    """A dataclass field that may be given as a function without arguments, called when the field is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            raise AttributeError(self._name)  # a dataclass takes what the class gives as the default, and there is none
        value = vars(instance)[self._name]
        if callable(value):
            value = vars(instance)[self._name] = value()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._name] = value


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation.

    Args:
        text: the new tokens as text, special tokens left out; "" without a tokenizer. It is made when it is first read,
            so that work with token ids never touches the tokenizer.
        token_ids: the new tokens only, the end token included if it was generated.
        finish_reason: "stop" where an end token came, "length" where max_new_tokens was reached.
        logprobs: of each new token under the model itself (temperature 1, unfiltered), natural logarithm.
    """

    text: str = cast(str, _WhenRead())
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"text": self.text}  # a pickle holds the text, not the tokenizer


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probabilities of a given text: `logprobs[i]` is that of `token_ids[i + 1]` after those before it."""

    token_ids: list[int]
    logprobs: list[float]


class LanguageModel:
    """What `load_quantized` returns.

    Args:
        model: the model, weights filled in.
        config: config.json as a dict.
        generation_config: generation_config.json as a dict, {} where there is none.
        folder: where the checkpoint lies, for the tokenizer; None for none.
        report: what loading did.

    `pickle` and `copy.deepcopy` take it, with the weights; compiled functions are made anew, and the tokenizer is read again
    from the folder unless it was set.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        folder: Path | None,
        report: LoadReport,
    ):
        self.model = model
        self.config = dict(config)
        self.generation_config = dict(generation_config)
        self.report = report
        self._tokenizer = FolderTokenizer(folder)
        self._compiled: tuple[Any, _Compiled] | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "config", "generation_config", "report", "_tokenizer")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tokenizer = state.pop("_tokenizer")
        self.__init__(**state, folder=None)
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Any | None:
        """The folder's Hugging Face tokenizer, None where it has none; read at first use, by one thread.

        Raises:
            CheckpointError: tokenizer files that cannot be read, or that need Python code from the checkpoint, which is
                never run. A tokenizer of one's own can be set instead.
        """
        return self._tokenizer.get()

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any | None) -> None:
        self._tokenizer = FolderTokenizer(None, given=tokenizer)

    @property
    def context_length(self) -> int:
        """Tokens a sequence may have, prompt and continuation together."""
        return self.model.config.max_position_embeddings

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a generation by default."""
        return self._defaults.eos_token_ids

    @property
    def _defaults(self) -> GenerationDefaults:
        return read_generation_config(self.generation_config, self.config)

    def weight(self, name: str) -> QArray | jax.Array:
        """A layer's weight as it is held.

        Args:
            name: the module's name: "model.layers.0.self_attn.qkv_proj", "model.embed_tokens", "lm_head".
        Raises:
            KeyError: no such layer; names the part that was not found and what is there.
        """
        name = name.removesuffix(".weight")
        if name == "lm_head" and self.model.lm_head is None:
            name = "model.embed_tokens"
        module, walked = self.model, []
        for part in name.split("."):
            found = None
            if part.isdigit() and hasattr(type(module), "__getitem__"):
                found = module[int(part)] if int(part) < len(module) else None  # pyright: ignore
            elif not part.startswith("_"):
                found = getattr(module, part, None)
            if found is None:
                raise KeyError(f"{name}: {'.'.join(walked) or 'the model'} has no {part!r}; it has {_children(module)}")
            module = found
            walked.append(part)
        if isinstance(module, SplitQArray):
            return module.joined()
        weight = module if isinstance(module, QArray | jax.Array) else getattr(module, "weight", None)
        if weight is None:
            raise KeyError(f"{name} has no weight of its own; it has {_children(module)}")
        return weight

    def logits(self, token_ids: Any) -> jax.Array:
        """Logits of every position: plain causal forward pass, no cache.

        Args:
            token_ids: int `[b, t]`.
        Returns:
            float32 `[b, t, vocab]`.
        Raises:
            ValueError: not [b, t], longer than the context, or ids outside the vocabulary.
        """
        ids = np.asarray(token_ids)
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"logits takes token ids [b, t], got shape {ids.shape}")
        self._check_ids(ids.reshape(-1), "token_ids")
        t = ids.shape[1]
        if t > self.context_length:
            raise ValueError(f"{t} tokens are more than the model's context of {self.context_length}")
        padded = np.zeros((ids.shape[0], bucket(t, self.context_length)), np.int32)
        padded[:, :t] = ids
        leaves, compiled = self._functions()
        return compiled.logits(leaves, padded, np.full(ids.shape[0], t, np.int32))[:, :t]

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        min_p: float | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        eos_token_ids: Sequence[int] | int | None = None,
        batch_size: int = 64,
    ) -> list[Generation]:
        """Continue prompts.

        Args:
            prompts: strings or lists of token ids, of different lengths.
            max_new_tokens: at most this many; the checkpoint's generation_config (max_new_tokens, or max_length less the
                longest prompt), else 128 or what the context holds.
            temperature, top_k, top_p, min_p: see `sampling`; one value, or one a prompt. Not given, the checkpoint's
                generation_config decides, and where that does not sample, decoding is greedy (temperature 0). Where
                it names no top_k none applies; transformers would take 50.
            seed: random seed; one, from which prompt i gets seed + i, or one a prompt.
            eos_token_ids: tokens that end a row; those of the checkpoint by default, [] for none.
            batch_size: how many prompts run at once.
        Returns:
            One `Generation` a prompt, in order.
        Raises:
            ValueError: an empty prompt, text without a tokenizer, ids outside the vocabulary, or more tokens than the
                context holds, all before any work.
        """
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            raise ValueError("generate takes a list of prompts; put a single one in a list")
        ids, new_tokens, ends = self._prepare(prompts, max_new_tokens, eos_token_ids)
        rules = self._sampling(len(ids), temperature, top_k, top_p, min_p, seed)
        return [
            generation
            for begin in range(0, len(ids), batch_size)
            for generation in self._generate_batch(
                ids[begin : begin + batch_size],
                jax.tree.map(lambda x, begin=begin: x[begin : begin + batch_size], rules),
                new_tokens,
                ends,
            )
        ]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        eos_token_ids: Sequence[int] | int | None = None,
    ) -> Iterator[Any]:
        """Continue one prompt piece by piece; the same tokens as `generate` gives.

        Returns:
            An iterator of pieces of text, never half a character, which joined are the text of `generate`; of token ids
            (end token included) without a tokenizer.
        Raises:
            ValueError: as in `generate`, at the call, before any work.
        """
        ids, new_tokens, ends = self._prepare([prompt], max_new_tokens, eos_token_ids)
        rules = self._sampling(1, temperature, top_k, top_p, min_p, seed)
        tokenizer = self.tokenizer if isinstance(prompt, str) else self._tokenizer.get_if_readable()
        tokens = self._stream_tokens(ids[0], rules, new_tokens, ends)
        return tokens if tokenizer is None else _as_text(tokens, TextStream(tokenizer))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generation:
        """Answer a conversation under the checkpoint's chat template.

        Args:
            messages: [{"role": "user", "content": "…"}, …]; what else a message holds is the template's.
            template_options: handed to the tokenizer's `apply_chat_template`: {"enable_thinking": False}, {"tools": […]}.
            options: as in `generate`.
        Raises:
            ValueError: no tokenizer or no chat template, messages of another form, or a template that fails on them; all
                before any work.
        """
        return self.generate([render_chat(self.tokenizer, messages, template_options or {})], **options)[0]

    def score(self, texts: Sequence[Prompt], *, batch_size: int = 8) -> list[Score]:
        """Log-probability of every token of given texts after its predecessors.

        Args:
            texts: strings or lists of at least two token ids.
            batch_size: how many run at once.
        Raises:
            ValueError: fewer than two tokens, or as in `generate`.
        """
        ids = [self._encode(text, f"texts[{i}]") for i, text in enumerate(texts)]
        for i, row in enumerate(ids):
            if not 2 <= len(row) <= self.context_length:
                raise ValueError(f"texts[{i}] has {len(row)} tokens; score takes 2 to {self.context_length}")
        scores = []
        leaves, compiled = self._functions()
        for begin in range(0, len(ids), batch_size):
            rows = ids[begin : begin + batch_size]
            padded, lengths = _pad(rows, self.context_length)
            logprobs = np.asarray(compiled.score(leaves, padded, lengths))
            for row, values in zip(rows, logprobs, strict=True):
                scores.append(Score(token_ids=list(row), logprobs=[float(x) for x in values[: len(row) - 1]]))
        return scores

    def _prepare(
        self, prompts: Sequence[Prompt], max_new_tokens: int | None, eos_token_ids: Sequence[int] | int | None
    ) -> tuple[list[list[int]], int, np.ndarray]:
        """Token ids, the number of new tokens and the end tokens, all checked."""
        defaults = self._defaults
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        ids = [self._encode(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        if max_new_tokens is None:
            longest = max(map(len, ids), default=0)
            max_new_tokens = defaults.new_tokens(longest, self.context_length)
            if max_new_tokens < 1:
                limit = min(defaults.max_length or self.context_length, self.context_length)
                raise ValueError(
                    f"the longest prompt has {longest} tokens, and {limit} is the limit for prompt and continuation"
                    f" (max_length in generation_config.json, or the context): pass max_new_tokens, or a shorter prompt"
                )
        for i, row in enumerate(ids):
            if not row:
                raise ValueError(f"prompts[{i}] is empty; a prompt needs at least one token")
            if len(row) + max_new_tokens > self.context_length:
                raise ValueError(
                    f"prompts[{i}]: {len(row)} prompt tokens and max_new_tokens={max_new_tokens} are more than the model's context "
                    f"of {self.context_length} (max_position_embeddings)"
                )
        ends = self.eos_token_ids if eos_token_ids is None else np.atleast_1d(np.asarray(eos_token_ids, np.int32))
        return ids, max_new_tokens, np.asarray(list(ends) or [-1], np.int32)

    def _encode(self, prompt: Prompt, where: str) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{where} is text, but the checkpoint folder has no tokenizer files; pass token ids")
            return list(self.tokenizer.encode(prompt))
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"{where}: expected a string or a list of token ids, got {type(prompt).__name__}")
        self._check_ids(ids, where)
        return [int(i) for i in ids]

    def _check_ids(self, ids: np.ndarray, where: str) -> None:
        vocab = self.model.config.vocab_size
        if ids.dtype.kind not in "iu" and ids.size:
            raise ValueError(f"{where}: token ids are integers, got {ids.dtype}")
        outside = ids[(ids < 0) | (ids >= vocab)]
        if outside.size:
            raise ValueError(f"{where}: token id {outside[0]} is outside the vocabulary of {vocab}")

    def _sampling(self, batch: int, temperature, top_k, top_p, min_p, seed) -> Sampling:
        """The caller's rules over those of the checkpoint's generation_config."""
        defaults = self._defaults
        return Sampling.of(
            batch,
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
            min_p=defaults.min_p if min_p is None else min_p,
            seed=seed,
        )

    def _generate_batch(
        self, ids: list[list[int]], sampling: Sampling, new_tokens: int, ends: np.ndarray
    ) -> list[Generation]:
        padded, lengths = _pad(ids, self.context_length)
        leaves, compiled = self._functions()
        out = compiled.generate(
            leaves,
            padded,
            lengths,
            sampling,
            ends,
            np.int32(new_tokens),
            capacity=bucket(new_tokens, self.context_length),
            cache_length=bucket(int(lengths.max()) + new_tokens, self.context_length),
        )
        tokens, logprobs, counts = (np.asarray(x) for x in out)
        generations = []
        for row, row_logprobs, count in zip(tokens, logprobs, counts, strict=True):
            new = [int(token) for token in row[:count]]
            generations.append(
                Generation(
                    text=cast(str, functools.partial(self._tokenizer.text, new)),
                    token_ids=new,
                    finish_reason="stop" if new[-1] in ends else "length",
                    logprobs=[float(x) for x in row_logprobs[:count]],
                )
            )
        return generations

    def _stream_tokens(self, ids: list[int], sampling: Sampling, new_tokens: int, ends: np.ndarray) -> Iterator[int]:
        padded, lengths = _pad([ids], self.context_length)
        leaves, compiled = self._functions()
        length = bucket(len(ids) + new_tokens, self.context_length)
        token, cache = compiled.first(leaves, padded, lengths, sampling, cache_length=length)
        for step in range(1, new_tokens + 1):
            # The next step is under way on the device before this token is looked at on the host.
            following = None
            if step < new_tokens:
                position = np.asarray([len(ids) + step - 1], np.int32)
                following, cache = compiled.next(leaves, cache, token, position, sampling, np.int32(step))
            emitted = int(token[0])
            yield emitted
            if emitted in ends or following is None:
                return
            token = following

    def _functions(self) -> tuple[list[jax.Array], "_Compiled"]:
        """The weights as leaves, and the compiled functions for their structure."""
        leaves, structure = jax.tree.flatten(self.model)
        if self._compiled is None or self._compiled[0] != structure:
            self._compiled = structure, _Compiled(structure)
        return leaves, self._compiled[1]


def _as_text(tokens: Iterator[int], stream: TextStream) -> Iterator[str]:
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if rest := stream.finish():
        yield rest


class _Compiled:
    """The jitted functions of one model structure; each takes the model's leaves first."""

    def __init__(self, structure: Any):
        def with_model(function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
            def call(leaves, *args, **options):
                return function(jax.tree.unflatten(structure, leaves), *args, **options)

            return jax.jit(call, **jit_options)

        self.logits = with_model(_padded_logits)
        self.score = with_model(_padded_scores)
        self.generate = with_model(generate, static_argnames=("capacity", "cache_length"))
        self.first = with_model(_first_token, static_argnames="cache_length")
        self.next = with_model(_next_token, donate_argnums=1)


def _padded_logits(model: CausalLM, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    valid = jnp.arange(token_ids.shape[1])[None] < lengths[:, None]
    hidden, _ = model.hidden_states(token_ids, valid=valid)
    return model.logits(hidden)


def _padded_scores(model: CausalLM, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """float32 `[b, t − 1]`: the log-probability of token i + 1 in column i."""
    logits = _padded_logits(model, token_ids, lengths)[:, :-1]
    chosen = jnp.take_along_axis(logits, token_ids[:, 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _first_token(model: CausalLM, token_ids, lengths, sampling: Sampling, *, cache_length: int):
    logits, cache = prefill(model, model.empty_cache(token_ids.shape[0], cache_length), token_ids, lengths)
    return sample(logits, sampling, jnp.int32(0))[0], cache


def _next_token(model: CausalLM, cache, token, position, sampling: Sampling, step):
    logits, cache = decode_step(model, cache, token, position)
    return sample(logits, sampling, step)[0], cache


def _pad(rows: Sequence[Sequence[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as int32 `[b, bucket]`, padded on the right, and their lengths `[b]`."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), bucket(int(lengths.max()), limit)), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, lengths


def _children(module: Any) -> str:
    names = [name for name in vars(module) if not name.startswith("_")] if hasattr(module, "__dict__") else []
    return ", ".join(names) or "nothing more"
