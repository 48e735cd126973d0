"""Which layer gets which scheme: the keys of vLLM's `quantization_config` for online quantization.

    key                       newer spelling   value
    global_scheme                              scheme of every linear and expert layer
    linear_scheme_override    linear           scheme of the linear layers instead
    moe_scheme_override       moe              scheme of the routed experts instead
    ignore                                     layers that stay as they are
    activation                                 "token" (default) or "tensor"

The `scheme` argument fills in `global_scheme`. A scheme is a name or a `Scheme`. `activation`
chooses between one scale a token and one for all tokens, where the weight leaves the choice
(`fp8_per_tensor`).

An entry of `ignore` is a full module name, or `re:` and a regex. A regex is matched from the start
of the name (`re.match`) and need not reach its end; everything else must be equal to the name. A
fused layer (`qkv_proj`) that is not listed literally is looked up by its shards' names (`q_proj`,
`k_proj`, `v_proj`), which have to agree. What is never quantized, `never_quantized` says. Source:
vLLM 0.20.2, `should_ignore_layer`.
"""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fp8jax.pallas_kernels.formats import ActivationGranularity
from fp8jax.schemes import (
    SCHEMES,
    UNSUPPORTED_SCHEMES,
    Scheme,
    scheme_named,
)

LayerKind = Literal["linear", "moe"]

_ALIASES = {"linear": "linear_scheme_override", "moe": "moe_scheme_override"}
_KEYS = ("global_scheme", "linear_scheme_override", "moe_scheme_override", "ignore", "activation")
_FUSED_SHARDS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# By last components of a name.
_NEVER_QUANTIZED = re.compile(
    r"(.*\.)?("
    r"embed_tokens"  # rows of it are looked up, not multiplied
    r"|lm_head"  # its errors reach the logits undiminished; often it is the embedding, too
    r"|.*norm|.*\.bias"  # vectors: nothing to save, and no product to speed up
    # Routers are small, and a slight error picks another expert.
    r"|router|router\.layer|(mlp|block_sparse_moe)\.gate|shared_expert_gate"
    r")"
)


def never_quantized(name: str) -> bool:
    """Whether a module stays as it is under every scheme: embeddings, lm_head, norms, biases and
    routers.

    Args:
        name: the module's, "model.layers.0.mlp.gate"; for a bias with ".bias" behind it.
    """
    return _NEVER_QUANTIZED.fullmatch(name) is not None


@dataclass(frozen=True)
class IgnoreEntry:
    """One entry of `ignore`: a literal module name, or a regex after `re:`."""

    text: str
    pattern: re.Pattern[str] | None

    @classmethod
    def parse(cls, text: str) -> "IgnoreEntry":
        if not text.startswith("re:"):
            return cls(text, None)
        try:
            return cls(text, re.compile(text[3:]))
        except re.error as error:
            raise ValueError(
                f"quantization_config: ignore entry {text!r} is not a valid regex: {error}"
            ) from None

    def matches(self, name: str) -> bool:
        return name == self.text if self.pattern is None else self.pattern.match(name) is not None


@dataclass(frozen=True)
class QuantizationConfig:
    """The scheme of linear layers, the scheme of routed experts, and what is left alone.

    Args:
        linear: scheme of linear layers, None for unquantized.
        moe: scheme of routed experts, None for unquantized.
        ignore: the layers that stay unquantized.
    """

    linear: Scheme | None = None
    moe: Scheme | None = None
    ignore: tuple[IgnoreEntry, ...] = ()

    @classmethod
    def parse(
        cls, scheme: str | Scheme | None, mapping: Mapping[str, Any] | None = None
    ) -> "QuantizationConfig":
        """Read what the user wrote.

        Args:
            scheme: one of `SCHEMES` by name, or a `Scheme`; "online" where everything is in
                `mapping`; None for no quantization.
            mapping: the keys of the table above.
        Raises:
            ValueError: an unknown scheme or key (with the closest one), a conflict, a bad regex, a
                value of the wrong type.
        """
        keys = _normalise_keys(mapping)
        methods = (*SCHEMES, "online")
        if scheme is None:
            if keys:
                raise ValueError(
                    "quantization_config is only supported when the scheme is one of "
                    f"{', '.join(methods)}, got None with the keys {', '.join(keys)}"
                )
            return cls()
        if not isinstance(scheme, Scheme) and scheme not in methods:
            if scheme in UNSUPPORTED_SCHEMES:
                scheme_named(scheme)
            raise ValueError(
                f"unknown quantization scheme {scheme!r}; it must be one of {', '.join(methods)}, "
                "or None"
            )

        of_all = keys.get("global_scheme")
        if scheme != "online":
            if of_all is not None and scheme_named(of_all) != scheme_named(scheme):
                raise ValueError(
                    f"scheme={scheme!r} conflicts with quantization_config's "
                    f"global_scheme={of_all!r}: these must match when both are given"
                )
            of_all = scheme
        given = {kind: keys.get(f"{kind}_scheme_override") or of_all for kind in ("linear", "moe")}
        if not any(given.values()):
            raise ValueError(
                'scheme "online" requires at least one of global_scheme, linear_scheme_override or '
                "moe_scheme_override in quantization_config"
            )
        schemes = {kind: scheme_named(one) if one else None for kind, one in given.items()}
        if "activation" in keys:
            schemes = _with_activation(schemes, keys["activation"])
        ignore = tuple(IgnoreEntry.parse(text) for text in keys.get("ignore", ()))
        return cls(linear=schemes["linear"], moe=schemes["moe"], ignore=ignore)

    def resolve(
        self, layer_name: str, kind: LayerKind = "linear", shards: Sequence[str] = ()
    ) -> Scheme | None:
        """The scheme of one layer, None where it stays as it is.

        Args:
            layer_name: the module's name, "model.layers.0.mlp.down_proj"; no ".weight".
            kind: "linear", or "moe" for the routed experts of a layer, which are one unit.
            shards: last components of the unfused names, ("q_proj", "k_proj", "v_proj"). Left out,
                those of qkv_proj and gate_up_proj are known.
        Raises:
            ValueError: the shards of a fused layer disagree about being ignored; names the layer,
                each shard and the entry that hit it.
        """
        if kind not in ("linear", "moe"):
            raise ValueError(f"kind is 'linear' or 'moe', got {kind!r}")
        scheme = self.linear if kind == "linear" else self.moe
        if scheme is None or never_quantized(layer_name):
            return None
        return None if self._ignores(layer_name, _shard_names(layer_name, kind, shards)) else scheme

    def unmatched(
        self, layers: Iterable[tuple[str, LayerKind, Sequence[str]]], others: Iterable[str] = ()
    ) -> list[str]:
        """One warning for every `ignore` entry that matched no layer, with the closest names.

        Args:
            layers: (name, kind, shards) of every layer that could have been quantized.
            others: names of modules that are never quantized; an entry that names one is redundant,
                not wrong.
        """
        layers = list(layers)
        names = [name for name, _, _ in layers]
        shard_names = {name: _shard_names(name, kind, shards) for name, kind, shards in layers}
        known = list(
            dict.fromkeys(
                [*names, *others, *(shard for shards in shard_names.values() for shard in shards)]
            )
        )
        warnings = []
        for entry in self.ignore:
            # vLLM asks a regex about the shards alone, so one that matches only the fused name
            # has no effect, and the fused name does not count as a match.
            hits = [
                n
                for n in known
                if entry.matches(n) and not (entry.pattern and shard_names.get(n, (n,)) != (n,))
            ]
            if not hits:
                warnings.append(_no_match(entry, known, shard_names))
        return warnings

    def _ignores(self, layer_name: str, shard_names: tuple[str, ...]) -> bool:
        if any(entry.text == layer_name for entry in self.ignore):
            return True
        hits = {
            shard: next((e.text for e in self.ignore if e.matches(shard)), None)
            for shard in shard_names
        }
        ignored = [shard for shard, entry in hits.items() if entry is not None]
        if ignored and len(ignored) < len(hits):
            told = "; ".join(
                f"{shard}: {f'ignored by {entry!r}' if entry else 'not ignored'}"
                for shard, entry in hits.items()
            )
            raise ValueError(
                f"quantization_config: the shards of the fused layer {layer_name} disagree: "
                f"{told}. They are one matrix: ignore all of them or none"
            )
        return bool(ignored)


def _normalise_keys(mapping: Mapping[str, Any] | None) -> dict[str, Any]:
    """The mapping under vLLM's older key names, checked; keys whose value is None are dropped."""
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        raise ValueError(
            f"quantization_config is a mapping with the keys {', '.join(_KEYS)}, got "
            f"{type(mapping).__name__}"
        )
    keys: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for written, value in mapping.items():
        if written == "targets":
            raise ValueError(
                "quantization_config: 'targets' exists in newer vLLM but is not supported by "
                "fp8jax yet; use linear_scheme_override, moe_scheme_override and ignore"
            )
        key = _ALIASES.get(written, written)
        if key not in _KEYS:
            close = difflib.get_close_matches(str(written), [*_KEYS, *_ALIASES], n=1, cutoff=0.0)
            raise ValueError(
                f"quantization_config: unknown key {written!r}; did you mean {close[0]!r}? Known: "
                f"{', '.join([*_KEYS, *_ALIASES])}"
            )
        if value is None:
            continue
        if key in keys and keys[key] != value:
            raise ValueError(
                f"quantization_config: {spelled[key]!r} and {written!r} are the same setting and "
                f"differ: {keys[key]!r} and {value!r}"
            )
        keys[key], spelled[key] = value, written

    for key in ("global_scheme", "linear_scheme_override", "moe_scheme_override"):
        if key in keys:
            try:
                scheme_named(keys[key])
            except ValueError as error:
                raise ValueError(f"quantization_config: {spelled[key]}: {error}") from None
    ignore = keys.get("ignore", [])
    if (
        isinstance(ignore, str)
        or not isinstance(ignore, Sequence)
        or not all(isinstance(e, str) for e in ignore)
    ):
        raise ValueError(f"quantization_config: 'ignore' is a list of strings, got {ignore!r}")
    if keys.get("activation", "token") not in ("token", "tensor"):
        raise ValueError(
            f"quantization_config: 'activation' is 'token' or 'tensor', got {keys['activation']!r}"
        )
    return keys


def _with_activation(
    schemes: dict[str, Scheme | None], activation: ActivationGranularity
) -> dict[str, Scheme | None]:
    """The schemes with another activation recipe, where their weights can take it."""

    chosen = {
        kind: dataclasses.replace(scheme, activation=activation)
        for kind, scheme in schemes.items()
        if scheme is not None and activation in scheme.granularity.activations
    }
    if not chosen:
        choosing = [name for name, s in SCHEMES.items() if len(s.granularity.activations) > 1]
        effective = ", ".join(
            f"{kind}: {scheme.name if scheme else None}" for kind, scheme in schemes.items()
        )
        raise ValueError(
            "quantization_config: 'activation' chooses the activation recipe of "
            f"{', '.join(choosing)}, but no layer has that scheme ({effective})"
        )
    return schemes | chosen


def _shard_names(layer_name: str, kind: LayerKind, shards: Sequence[str]) -> tuple[str, ...]:
    parent, _, last = layer_name.rpartition(".")
    if kind == "moe":
        return (layer_name,)
    shards = tuple(shards) or _FUSED_SHARDS.get(last, (last,))
    return tuple(f"{parent}.{shard}" if parent else shard for shard in shards)


def _no_match(entry: IgnoreEntry, known: list[str], shard_names: dict[str, tuple[str, ...]]) -> str:
    text = entry.text.removeprefix("re:")
    fused = [n for n, shards in shard_names.items() if shards != (n,) and entry.matches(n)]
    if fused:
        last = [shard.rpartition(".")[2] for shard in shard_names[fused[0]]]
        hint = (
            f"it matches the fused layer {fused[0]}, which is looked up by its shards: write a "
            f"pattern for {', '.join(last)}"
        )
    elif entry.pattern is None and (globbed := fnmatch.filter(known, entry.text)):
        regex = "re:" + ".*".join(re.escape(part) for part in entry.text.split("*")) + "$"
        hint = f"globs are not supported; as a regex it would be '{regex}' ({len(globbed)} layers)"
    elif entry.pattern is None and (ends := [n for n in known if n.endswith(f".{text}")]):
        hint = (
            f"names are matched whole: write '{ends[0]}', or 're:.*{re.escape(text)}$' for all "
            f"{len(ends)} layers"
        )
    else:
        close = difflib.get_close_matches(text.removesuffix(".weight"), known, n=3, cutoff=0.0)
        hint = f"the closest layer names are {', '.join(close)}"
    return f"quantization_config: ignore entry '{entry.text}' matched no layer; {hint}"
