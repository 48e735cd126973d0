"""Which tensors of a checkpoint make which weight of a model, and whether the two fit at all.

The model is built abstract: its weights are shapes. `model_parameters` walks it and lists a
`Parameter` for each weight, with the names and shapes of the tensors that it is made of:

    model.layers.0.self_attn.qkv_proj
        q_proj.weight, k_proj.weight, v_proj.weight, stacked along rows
    model.layers.0.mlp.experts.gate_up_proj
        experts.0.gate_proj.weight, experts.0.up_proj.weight, experts.1.…,
        or one tensor [e, 2i, h], whichever way the checkpoint writes it

`check_against` compares the list with the headers: what is missing, unknown, misshapen or of
another kind of number comes out as one error, before any work.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from flax import nnx

from fp8jax.checkpoints.errors import CheckpointError, Faults, shown
from fp8jax.checkpoints.folder import Checkpoint
from fp8jax.models import CausalLM, DecoderConfig
from fp8jax.models.config import ExpertNames
from fp8jax.models.layers import Linear
from fp8jax.models.moe import Router, SparseMoE
from fp8jax.quantization_config import LayerKind, never_quantized

_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")
_COMPARED_BYTES = 16 << 20
# Similar names are looked for in so many faults, among so many tensors: each comparison takes some
# 20 µs.
_HINTED_FAULTS, _HINT_CANDIDATES = 20, 1000
_FLOAT_DTYPES = ("bfloat16", "float16", "float32")
# Buffers that old checkpoints carry and that follow from config.json.
_DERIVED_TENSORS = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.(masked_bias|bias))")


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one tensor of the checkpoint, the tensor taken as a matrix of rows
    whatever its shape.

    Args:
        source: its name.
        first, rows: which rows of it.
    """

    source: str
    first: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One weight of the model and where it comes from.

    Args:
        module, attribute: where it goes.
        name: the module's name; the attribute is not part of it.
        sources: the checkpoint's tensors that are stacked along the first dimension to make it,
            with the shape each must have.
        shape: its shape.
        kind: what it counts as for the quantization config; "other" for what is never quantized.
        shards: last components of the unfused names, for `ignore`.
    """

    module: nnx.Module
    attribute: str
    name: str
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    shape: tuple[int, ...]
    kind: LayerKind | Literal["other"]
    shards: tuple[str, ...] = ()

    @property
    def experts(self) -> int | None:
        """How many experts are stacked in it; None for a weight that is no stack."""
        return None

    def spans_of(self, expert: int | None) -> tuple[Span, ...]:
        """What the weight, or one expert's matrix of it, is made of: each shard's rows, from top to
        bottom."""
        return tuple(Span(source, 0, shape[0]) for source, shape in self.sources)


@dataclass(frozen=True, kw_only=True)
class ExpertParameter(Parameter):
    """One weight of all experts of a layer, `[e, n, k]`.

    Args:
        sources: each expert's shards in turn, or one tensor of the stack's shape.
        row_groups: 2 for gate and up, which share no block and are looked at apart in the report; 1
            for down.
        alias: what the family's own files call the experts, where that is not `name`; `ignore` may
            say it too.
    """

    row_groups: int
    alias: str

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds all experts."""
        return self.sources[0][1] == self.shape

    @property
    def experts(self) -> int:
        return self.shape[0]

    def spans_of(self, expert: int | None) -> tuple[Span, ...]:
        assert expert is not None
        n, groups = self.shape[1], self.row_groups
        if self.stacked:
            source = self.sources[0][0]
            return tuple(
                Span(source, expert * n + group * (n // groups), n // groups)
                for group in range(groups)
            )
        first = expert * groups
        return tuple(
            Span(source, 0, shape[0]) for source, shape in self.sources[first : first + groups]
        )


def model_parameters(model: CausalLM, tensors: Collection[str]) -> Iterator[Parameter]:
    """Every weight of a model and what it is made of, in the order of the forward pass.

    Args:
        model: abstract.
        tensors: the names in the checkpoint, which decide where there are several ways to write the
            same weight.
    """
    for path, module in nnx.iter_modules(model):
        name = ".".join(str(part) for part in path)
        if isinstance(module, Linear):
            yield from _linear_parameters(name, module)
        elif isinstance(module, SparseMoE):
            yield from _moe_parameters(name, module, tensors)
        elif isinstance(getattr(module, "weight", None), jax.ShapeDtypeStruct) and not isinstance(
            module, Router
        ):
            yield _plain_parameter(module, name, f"{name}.weight")


def _linear_parameters(name: str, module: Linear) -> Iterator[Parameter]:
    parent = name.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    names = [f"{prefix}{shard}" for shard, _ in module.shards]
    n, k = module.weight.shape
    yield Parameter(
        module=module,
        attribute="weight",
        name=name,
        sources=tuple(
            (f"{source}.weight", (rows, k))
            for source, (_, rows) in zip(names, module.shards, strict=True)
        ),
        shape=(n, k),
        kind="other" if never_quantized(name) else "linear",
        shards=tuple(shard for shard, _ in module.shards),
    )
    if module.bias is not None:
        yield Parameter(
            module=module,
            attribute="bias",
            name=name,
            sources=tuple(
                (f"{source}.bias", (rows,))
                for source, (_, rows) in zip(names, module.shards, strict=True)
            ),
            shape=(n,),
            kind="other",
        )


def _plain_parameter(module: nnx.Module, name: str, source: str) -> Parameter:
    shape = module.weight.shape  # pyright: ignore[reportAttributeAccessIssue]
    return Parameter(
        module=module,
        attribute="weight",
        name=name,
        sources=((source, shape),),
        shape=shape,
        kind="other",
    )


def _moe_parameters(name: str, module: SparseMoE, tensors: Collection[str]) -> Iterator[Parameter]:
    """The router and the two stacks of one layer."""
    layer = name.rpartition(".")[0]
    num_experts = module.config.num_experts
    names = _names_in_use(module.config.names, layer, num_experts, tensors)
    yield _plain_parameter(module.gate, f"{name}.gate", f"{layer}.{names.router}")
    for attribute, source_names, row_groups in (
        ("gate_up_proj", names.gate_up, 2),
        ("down_proj", (names.down,), 1),
    ):
        e, n, k = shape = getattr(module.experts, attribute).shape
        whole = "{e}" not in source_names[0]
        yield ExpertParameter(
            module=module.experts,
            attribute=attribute,
            name=f"{name}.experts",
            sources=tuple(
                (source, shape if whole else (n // row_groups, k))
                for source in _written_out(source_names, layer, num_experts)
            ),
            shape=(e, n, k),
            kind="moe",
            row_groups=row_groups,
            alias=f"{layer}.{module.config.names[0].experts}",
        )


def _names_in_use(
    known: Sequence[ExpertNames], layer: str, num_experts: int, tensors: Collection[str]
) -> ExpertNames:
    """The way of writing a layer's experts that most of its names are in the checkpoint of; the
    first of equals."""

    def share_present(names: ExpertNames) -> float:
        wanted = _written_out((names.router, *names.gate_up, names.down), layer, num_experts)
        return sum(name in tensors for name in wanted) / len(wanted)

    return max(known, key=share_present)


def _written_out(names: Sequence[str], layer: str, num_experts: int) -> list[str]:
    """Full names: those of expert 0, those of expert 1, …; a name without "{e}" stands once."""
    written = [
        f"{layer}.{name.replace('{e}', str(e))}" for e in range(num_experts) for name in names
    ]
    return list(dict.fromkeys(written))


def tied_as_stored(config: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """The config with `tied` as the files have it: an lm_head of its own wins over the flag, an
    equal one is not held twice."""
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if not config.tied or head not in checkpoint.tensors or table not in checkpoint.tensors:
        return config
    one, other = checkpoint.tensors[head], checkpoint.tensors[table]
    if (one.shape, one.dtype) == (other.shape, other.dtype) and _same_bytes(
        checkpoint, head, table
    ):
        return config
    return dataclasses.replace(config, tied=False)


def _same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of one shape and dtype are equal, by bytes; read in pieces, for they may
    be large."""
    rows, nbytes = checkpoint.tensors[one].shape[0], checkpoint.tensors[one].nbytes
    step = max(1, rows * _COMPARED_BYTES // max(nbytes, 1))
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        if checkpoint.read(one, piece).tobytes() != checkpoint.read(other, piece).tobytes():
            return False
    return True


def check_layer_count(checkpoint: Checkpoint) -> None:
    """Holds the number of layers in config.json against the names in the files, before anything is
    built by it.

    Raises:
        CheckpointError: config.json asks for more layers than there are.
    """
    wanted = checkpoint.config.get("num_hidden_layers")
    found = max(
        (int(match[1]) + 1 for name in checkpoint.tensors if (match := _LAYER.search(name))),
        default=0,
    )
    if type(wanted) is int and wanted > found:  # of another type: whoever reads the config says so
        raise CheckpointError(
            f"{checkpoint.folder}: config.json says num_hidden_layers is {wanted}, "
            f"{_held(checkpoint, found, 'layer')}; do the two belong together, and is every shard "
            "there?"
        )


def check_expert_count(checkpoint: Checkpoint, config: DecoderConfig) -> None:
    """Holds the number of experts in config.json against the files, by their names or by the
    stacks' first dimension.

    Raises:
        CheckpointError: config.json asks for more experts than there are.
    """
    if config.moe is None or not any(map(config.has_experts, range(config.num_layers))):
        return
    found = max(
        (int(match[1]) + 1 for name in checkpoint.tensors if (match := _EXPERT.search(name))),
        default=0,
    )
    stacks = (info.shape[0] for info in checkpoint.tensors.values() if len(info.shape) == 3)
    found = max([found, *stacks])
    if config.moe.num_experts > found:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json says that there are {config.moe.num_experts} "
            f"experts, {_held(checkpoint, found, 'expert')}; do the two belong together, and is "
            "every shard there?"
        )


def _held(checkpoint: Checkpoint, found: int, what: str) -> str:
    if found:
        return f"the files have {found} {what}{'s' if found > 1 else ''}"
    first = next(iter(checkpoint.tensors), None)
    return f"the files have no tensor of {what}s" + (
        f" (the first is called {shown(first)})" if first else " and no other"
    )


def check_against(checkpoint: Checkpoint, parameters: Sequence[Parameter]) -> None:
    """Compare names, shapes and dtypes of the model and of the headers.

    Raises:
        CheckpointError: lists all faults.
    """
    faults = Faults()
    wanted = {source: shape for p in parameters for source, shape in p.sources}
    unknown = sorted(set(checkpoint.tensors) - set(wanted))
    for source, shape in wanted.items():
        info = checkpoint.tensors.get(source)
        if info is None:
            close = []
            if len(faults) < _HINTED_FAULTS:
                close = difflib.get_close_matches(source, unknown[:_HINT_CANDIDATES], n=1)
            hint = (
                f"; the checkpoint has {shown(close[0])}, which the model does not" if close else ""
            )
            faults.append(f"{source}: missing, config.json asks for shape {list(shape)}{hint}")
        elif tuple(info.shape) != shape:
            faults.append(
                f"{source}: the checkpoint has shape {list(info.shape)}, config.json says "
                f"{list(shape)}; do the two files belong together?"
            )
        elif info.dtype.name not in _FLOAT_DTYPES:
            faults.append(
                f"{source}: dtype {info.dtype.name}; online quantization starts from "
                f"{', '.join(_FLOAT_DTYPES)} weights"
            )
    for name in unknown:
        # A tied head was seen to in `tied_as_stored`.
        if name != "lm_head.weight" and not _DERIVED_TENSORS.fullmatch(name):
            faults.append(
                f"{shown(name)}: in the checkpoint, but no weight of this architecture; "
                "config.json may ask for too few layers, or for a switch (a bias, say) that it "
                "leaves out"
            )
    if faults:
        raise CheckpointError.gather(str(checkpoint.folder), faults)
