"""LanguageModel: a loaded model with its tokenizer and configuration; text or token ids in, text or
logits out.

The model itself is `lm.model`, a plain pytree. This class keeps the host's side: it turns prompts
into padded arrays of few different shapes (`batches`), calls the compiled functions
(`compiled_model`), and turns tokens into text.
"""

import contextlib
import functools
import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from fp8jax.batches import Batch, batches, bucket, cache_room, end_ids, pad
from fp8jax.checkpoints.load_report import LoadReport
from fp8jax.compiled_model import CompiledModel
from fp8jax.explanation import Explanation, explain
from fp8jax.generation_config import GenerationDefaults, read_generation_config
from fp8jax.models import CausalLM
from fp8jax.qarray import QArray, SplitQArray
from fp8jax.results import Generation, Score
from fp8jax.sampling import Sampling, numbers
from fp8jax.tokenizer import FolderTokenizer, TextStream, render_chat

Prompt = str | Sequence[int]
# Tokens that are decoded before Python looks again whether it was interrupted.
_TOKENS_A_PORTION = 32
# Threads that share a new model make one `CompiledModel`.
_MAKING_FUNCTIONS = threading.Lock()


class LanguageModel:
    """What `load_quantized` returns.

    Args:
        model: the model, weights filled in.
        config: config.json as a dict.
        generation_config: generation_config.json as a dict, {} where there is none.
        folder: where the checkpoint lies, for the tokenizer; None for none.
        report: what loading did.

    `pickle` and `copy.deepcopy` take it, with the weights; compiled functions are made anew, and
    the tokenizer is read again from the folder unless it was set.
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
        self._compiled: CompiledModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "config", "generation_config", "report", "_tokenizer")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tokenizer = state.pop("_tokenizer")
        self.__init__(**state, folder=None)
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Any | None:
        """The folder's Hugging Face tokenizer, None where it has none; read at first use, by one
        thread.

        Raises:
            CheckpointError: tokenizer files that cannot be read, or that need Python code from the
                checkpoint, which is never run. A tokenizer of one's own can be set instead.
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
            name: the module's name: "model.layers.0.self_attn.qkv_proj", "model.embed_tokens",
                "lm_head".
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
                raise KeyError(
                    f"{name}: {'.'.join(walked) or 'the model'} has no {part!r}; it has "
                    f"{_children(module)}"
                )
            module = found
            walked.append(part)
        if isinstance(module, SplitQArray):
            return module.joined()
        weight = (
            module if isinstance(module, QArray | jax.Array) else getattr(module, "weight", None)
        )
        if weight is None:
            raise KeyError(f"{name} has no weight of its own; it has {_children(module)}")
        return weight

    def explain(
        self, *, batch: int = 1, prompt_tokens: int | None = None, device: str | None = None
    ) -> Explanation:
        """Which kernel, with which tiles, would run each operation of each layer, and why not
        another; print it.

        Args:
            batch: rows of the decode step and of the prefill.
            prompt_tokens: tokens of a row in the prefill; 512, or what the context holds.
            device: `device_kind` of a GPU that need not be here, "NVIDIA H100 80GB HBM3"; the
                current device by default.
        Raises:
            ValueError: more tokens than the context holds.
            NotImplementedError: the model was loaded with an implementation that the device has
                not.
        """
        tokens = min(512, self.context_length) if prompt_tokens is None else prompt_tokens
        return explain(self.model, batch=batch, prompt_tokens=tokens, device=device)

    def logits(self, token_ids: Any) -> jax.Array:
        """Logits of every position: plain causal forward pass, no cache.

        Args:
            token_ids: int `[b, t]`.
        Returns:
            float32 `[b, t, vocab]`.
        Raises:
            ValueError: not [b, t], longer than the context, or ids outside the vocabulary.
        """
        try:
            ids = np.asarray(token_ids)
        except ValueError as error:
            raise ValueError(
                "logits takes token ids [b, t], got rows of different lengths or something that "
                "is no number; give rows of one length, or one row at a time"
            ) from error
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"logits takes token ids [b, t], got shape {ids.shape}")
        self._check_ids(ids.reshape(-1), "token_ids")
        t = ids.shape[1]
        if t > self.context_length:
            raise ValueError(
                f"{t} tokens are more than the model's context of {self.context_length} "
                "(max_position_embeddings, or what else config.json says of it)"
            )
        batch = pad(ids.tolist(), limit=self.context_length)
        leaves, compiled = self._functions()
        return compiled.logits(leaves, batch.token_ids, batch.lengths)[:, :t]

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
            max_new_tokens: at most this many; the checkpoint's generation_config (max_new_tokens,
                or max_length less the longest prompt), else 128 or what the context holds.
            temperature, top_k, top_p, min_p: see `sampling`; one value, or one a prompt. Not given,
                the checkpoint's generation_config decides, and where that does not sample, decoding
                is greedy (temperature 0). Where it names no top_k none applies; transformers would
                take 50.
            seed: random seed; one, with which each prompt's number is combined, or one a prompt,
                whose draws then depend on nothing else. Draws depend neither on the batches nor on
                the other prompts.
            eos_token_ids: tokens that end a row; those of the checkpoint by default, [] for none.
            batch_size: how many prompts run at once; fewer where memory does not hold so many.
        Returns:
            One `Generation` a prompt, in order.
        Raises:
            ValueError: an empty prompt, text without a tokenizer, ids outside the vocabulary, more
                tokens than the context holds, or an option that is not what it should be, all
                before any work.
            FloatingPointError: the model's logits for a prompt are NaN or infinite.

        Ctrl-C is noticed after the prompts were read and then every 32 tokens.
        """
        _check_list("generate", "prompts", prompts)
        batch_size = _whole_number("batch_size", batch_size)
        ids, new_tokens, ends = self._prepare(prompts, max_new_tokens, eos_token_ids)
        rules = self._sampling(len(ids), temperature, top_k, top_p, min_p, seed)
        rules = jax.tree.map(
            np.asarray, rules
        )  # on the host, rows are taken from it without compiling anything
        return [
            generation
            for batch in batches(
                ids,
                self.model.config,
                batch_size=batch_size,
                new_tokens=new_tokens,
                device=self._device(),
            )
            for generation in self._generate_batch(
                batch, jax.tree.map(batch.filled, rules), new_tokens, ends
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
            An iterator of pieces of text, never half a character, which joined are the text of
            `generate`; of token ids (end token included) without a tokenizer.
        Raises:
            ValueError: as in `generate`, at the call, before any work.
            FloatingPointError: as in `generate`, when the piece is asked for.
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
            messages: [{"role": "user", "content": "…"}, …]; what else a message holds is the
                template's.
            template_options: handed to the tokenizer's `apply_chat_template`: {"enable_thinking":
                False}, {"tools": […]}.
            options: as in `generate`.
        Raises:
            ValueError: no tokenizer or no chat template, messages of another form, or a template
                that fails on them; all before any work.
        """
        return self.generate(
            [render_chat(self.tokenizer, messages, template_options or {})], **options
        )[0]

    def score(self, texts: Sequence[Prompt], *, batch_size: int = 8) -> list[Score]:
        """Log-probability of every token of given texts after its predecessors.

        Args:
            texts: strings or lists of at least two token ids.
            batch_size: how many run at once; fewer where memory does not hold so many.
        Raises:
            ValueError: fewer than two tokens, or as in `generate`.
            FloatingPointError: as in `generate`.
        """
        _check_list("score", "texts", texts)
        batch_size = _whole_number("batch_size", batch_size)
        ids = [self._encode(text, f"texts[{i}]") for i, text in enumerate(texts)]
        for i, row in enumerate(ids):
            if not 2 <= len(row) <= self.context_length:
                raise ValueError(
                    f"texts[{i}] has {len(row)} tokens; score takes 2 to {self.context_length}"
                )
        scores = []
        leaves, compiled = self._functions()
        for batch in batches(
            ids, self.model.config, batch_size=batch_size, new_tokens=None, device=self._device()
        ):
            logprobs = np.asarray(compiled.score(leaves, batch.token_ids, batch.lengths))
            for i, values in enumerate(logprobs[: batch.rows], batch.first):
                values = values[: len(ids[i]) - 1]
                if not np.isfinite(values).all():
                    raise _not_finite(
                        f"texts[{i}]", f"token {int(np.argmin(np.isfinite(values))) + 1}"
                    )
                scores.append(Score(token_ids=list(ids[i]), logprobs=[float(x) for x in values]))
        return scores

    def _prepare(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None,
        eos_token_ids: Sequence[int] | int | None,
    ) -> tuple[list[list[int]], int, np.ndarray]:
        """Token ids, the number of new tokens and the end tokens, all checked."""
        defaults = self._defaults
        if max_new_tokens is not None:
            max_new_tokens = _whole_number("max_new_tokens", max_new_tokens)
        ids = [self._encode(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        if max_new_tokens is None:
            longest = max(map(len, ids), default=0)
            max_new_tokens = defaults.new_tokens(longest, self.context_length)
            if max_new_tokens < 1:
                limit = min(defaults.max_length or self.context_length, self.context_length)
                raise ValueError(
                    f"the longest prompt has {longest} tokens, and {limit} is the limit for prompt "
                    "and continuation (max_length in generation_config.json, or the context): "
                    "pass max_new_tokens, or a shorter prompt"
                )
        for i, row in enumerate(ids):
            if not row:
                raise ValueError(f"prompts[{i}] is empty; a prompt needs at least one token")
            if len(row) + max_new_tokens > self.context_length:
                raise ValueError(
                    f"prompts[{i}]: {len(row)} prompt tokens and max_new_tokens={max_new_tokens} "
                    f"are more than the model's context of {self.context_length} "
                    "(max_position_embeddings)"
                )
        ends = (
            self.eos_token_ids
            if eos_token_ids is None
            else numbers("eos_token_ids", eos_token_ids, "whole")
        )
        outside = [int(end) for end in np.atleast_1d(ends) if not -1 <= end < 2**31]
        if outside:
            raise ValueError(f"eos_token_ids holds {outside[0]}, expected token ids")
        return ids, max_new_tokens, end_ids(np.atleast_1d(ends).tolist())

    def _encode(self, prompt: Prompt, where: str) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{where} is text, but the checkpoint folder has no tokenizer files; pass "
                    "token ids"
                )
            return list(self.tokenizer.encode(prompt))
        try:
            ids = np.asarray(prompt)
        except ValueError as error:  # NumPy's for a list in a list
            raise ValueError(
                f"{where}: expected a string or a flat list of token ids, got a list whose items "
                "differ in kind or length"
            ) from error
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                f"{where}: expected a string or a list of token ids, got {type(prompt).__name__}"
            )
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
        self, batch: Batch, sampling: Sampling, new_tokens: int, ends: np.ndarray
    ) -> list[Generation]:
        leaves, compiled = self._functions()
        decoding = compiled.begin(
            leaves,
            batch.token_ids,
            batch.lengths,
            sampling,
            ends,
            capacity=bucket(new_tokens, self.context_length),
            cache_length=cache_room(batch.token_ids.shape[1], new_tokens, self.context_length),
        )
        done = 1
        try:
            while True:
                active, (tokens, logprobs, counts) = jax.device_get((decoding.active, decoding.out))
                for i in range(batch.rows):
                    if not np.isfinite(logprobs[i, counts[i] - 1]):
                        raise _not_finite(
                            f"prompts[{batch.first + i}]", f"new token {counts[i] - 1}"
                        )
                if done >= new_tokens or not active.any():
                    break
                done = min(done + _TOKENS_A_PORTION, new_tokens)
                decoding = compiled.advance(leaves, decoding, sampling, ends, np.int32(done))
        except KeyboardInterrupt:
            # A process that ends while the device is at work aborts. RuntimeError: donated a moment
            # ago.
            with contextlib.suppress(RuntimeError):
                jax.block_until_ready(decoding)
            raise
        generations = []
        for row, row_logprobs, count in zip(tokens[: batch.rows], logprobs, counts, strict=False):
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

    def _stream_tokens(
        self, ids: list[int], sampling: Sampling, new_tokens: int, ends: np.ndarray
    ) -> Iterator[int]:
        batch = pad([ids], limit=self.context_length)
        leaves, compiled = self._functions()
        length = cache_room(batch.token_ids.shape[1], new_tokens, self.context_length)
        token, logprob, cache = compiled.first(
            leaves, batch.token_ids, batch.lengths, sampling, cache_length=length
        )
        for step in range(1, new_tokens + 1):
            # The next step is under way on the device before this token is looked at on the host.
            following = None
            if step < new_tokens:
                position = np.asarray([len(ids) + step - 1], np.int32)
                *following, cache = compiled.next(
                    leaves, cache, token, position, sampling, np.int32(step)
                )
            emitted = int(token[0])
            if not np.isfinite(float(logprob[0])):
                raise _not_finite("prompt", f"new token {step - 1}")
            yield emitted
            if emitted in ends or following is None:
                return
            token, logprob = following

    def _device(self) -> Any:
        """Where the weights lie; the first of several."""
        return min(jax.tree.leaves(self.model)[0].devices(), key=lambda device: device.id)

    def _functions(self) -> tuple[list[jax.Array], CompiledModel]:
        """The weights as leaves, and the compiled functions for their structure."""
        leaves, structure = jax.tree.flatten(self.model)
        with _MAKING_FUNCTIONS:
            if self._compiled is None or self._compiled.structure != structure:
                self._compiled = CompiledModel(structure)
            return leaves, self._compiled


def _as_text(tokens: Iterator[int], stream: TextStream) -> Iterator[str]:
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if rest := stream.finish():
        yield rest


def _check_list(function: str, name: str, values: Any) -> None:
    if (
        isinstance(values, str)
        or not hasattr(values, "__len__")
        or not hasattr(values, "__getitem__")
    ):
        raise ValueError(
            f"{function} takes a list of {name}, got a {type(values).__name__}; put a single one "
            "in a list"
        )
    if isinstance(values, Mapping) or (len(values) and isinstance(values[0], int | np.integer)):
        raise ValueError(f"{function} takes a list of {name}; put a single one in a list")


def _whole_number(name: str, value: Any) -> int:
    """A whole number of at least 1; True, 2.5 and 2.0 are none."""
    if (
        isinstance(value, bool | np.bool_)
        or not hasattr(value, "__index__")
        or operator.index(value) < 1
    ):
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
    return operator.index(value)


def _not_finite(where: str, place: str) -> FloatingPointError:
    return FloatingPointError(
        f"{where}: the model's logits for {place} are NaN or infinite, so nothing can be chosen or "
        "scored. Activations beyond what dtype holds are the usual reason: try dtype='float32', "
        "or 'bfloat16' in place of 'float16'. If float32 fails too, the weights are damaged or "
        "the config does not belong to them"
    )


def _children(module: Any) -> str:
    names = (
        [name for name in vars(module) if not name.startswith("_")]
        if hasattr(module, "__dict__")
        else []
    )
    return ", ".join(names) or "nothing more"
