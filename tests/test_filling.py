"""Weights that are filled in piece by piece are those that are filled in at once, whatever the size
of the pieces."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from golden_checkpoints import GOLDENS, load
from safetensors.numpy import load_file, save_file
from selection import mostly_slow
from test_loading import FILE, reconfigure, rewrite
from test_moe_loading import same_weights
from test_qarray import bits, oracle_block, oracle_tensor

import fp8jax
from fp8jax import qarray
from fp8jax.checkpoints import filling
from fp8jax.checkpoints.filling import _cut
from fp8jax.checkpoints.folder import Checkpoint, CheckpointError
from fp8jax.pallas_kernels.formats import WEIGHTS
from fp8jax.quantization_config import QuantizationConfig
from fp8jax.schemes import FP8_PER_CHANNEL


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 128 rows, the least there is, for whatever is larger."""
    monkeypatch.setattr(filling, "PIECE_BYTES", 1 << 12)


@pytest.fixture
def per_channel(monkeypatch):
    """Every layer under a scale a row, which no scheme name asks for."""
    monkeypatch.setattr(QuantizationConfig, "resolve", lambda *_, **__: FP8_PER_CHANNEL)


@pytest.mark.parametrize(
    "variant, scheme",
    mostly_slow(
        [
            ("llama2", "fp8_per_tensor"),
            ("llama_fp32_sharded", "fp8_per_block"),
            ("mixtral", "fp8_per_block"),  # experts one by one
            ("granitemoe", "fp8_per_tensor"),  # stacked
            ("granitemoe", None),
        ],
        quick=[("llama2", "fp8_per_tensor"), ("mixtral", "fp8_per_block")],
    ),
)
def test_pieces_make_the_same_weights_and_report_to_the_bit(
    variant: str, scheme: str | None, request
):
    """Rows of 64 to 352 weights: qkv 128 to 192 rows, experts of 144 and 96 whose blocks end within
    a row group."""
    whole = fp8jax.load_quantized(GOLDENS / variant, scheme)
    request.getfixturevalue("small_pieces")
    pieces = fp8jax.load_quantized(GOLDENS / variant, scheme)
    same_weights(pieces, whole)
    for one, other in zip(pieces.report.layers, whole.report.layers, strict=True):
        assert (one.name, one.shard_amax, one.bytes_after) == (
            other.name,
            other.shard_amax,
            other.bytes_after,
        )
        if one.relative_error is not None and other.relative_error is not None:
            # Of more than 256 rows others are looked at: 1.3 % is seen.
            assert one.relative_error == pytest.approx(other.relative_error, rel=2e-2)


def test_pieces_under_a_scale_a_row(per_channel, request):
    whole = fp8jax.load_quantized(GOLDENS / "granitemoe", "fp8_per_block")
    request.getfixturevalue("small_pieces")
    same_weights(fp8jax.load_quantized(GOLDENS / "granitemoe", "fp8_per_block"), whole)


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "fp8_per_block"])
def test_pieces_of_a_stack_that_is_cut_into_parts(scheme: str, monkeypatch, small_pieces):
    whole = load("granitemoe", scheme)
    monkeypatch.setattr(qarray, "unaddressable", lambda size: size > 1000)
    split = fp8jax.load_quantized(GOLDENS / "granitemoe", scheme)
    for stack in ("gate_up_proj", "down_proj"):
        one, other = (lm.weight(f"model.layers.0.mlp.experts.{stack}") for lm in (whole, split))
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other
        )


@pytest.mark.parametrize(
    "scheme, oracle", [("fp8_per_tensor", oracle_tensor), ("fp8_per_block", oracle_block)]
)
def test_a_fused_layer_in_pieces_equals_numpy(scheme: str, oracle: Any, small_pieces):
    """The scale of a whole tensor is not that of a piece; its largest weight lies in one piece
    only."""
    tensors = load_file(GOLDENS / "llama2" / FILE)
    shards = ["gate_proj", "up_proj"]
    weight = np.concatenate([tensors[f"model.layers.1.mlp.{shard}.weight"] for shard in shards])
    codes, scale = oracle(weight)
    q: Any = fp8jax.load_quantized(GOLDENS / "llama2", scheme).weight(
        "model.layers.1.mlp.gate_up_proj"
    )
    np.testing.assert_array_equal(bits(q.qvalue), bits(codes))
    np.testing.assert_array_equal(bits(q.scale), bits(scale))


def test_shards_of_different_dtypes_are_one_matrix(tmp_path: Path, small_pieces):
    folder = shutil.copytree(GOLDENS / "llama2", tmp_path / "mixed")
    name = "model.layers.0.self_attn.{}_proj.weight"
    rewrite(
        folder,
        lambda t: t.update({name.format("k"): t[name.format("k")].astype(np.float32) * 1.001}),
    )
    tensors = load_file(folder / FILE)
    assert {tensors[name.format(x)].dtype for x in "qk"} == {
        np.dtype(np.float32),
        np.dtype(ml_dtypes.bfloat16),
    }
    codes, scale = oracle_tensor(
        np.concatenate([tensors[name.format(x)].astype(np.float32) for x in "qkv"])
    )
    q: Any = fp8jax.load_quantized(folder, "fp8_per_tensor").weight(
        "model.layers.0.self_attn.qkv_proj"
    )
    np.testing.assert_array_equal(bits(q.qvalue), bits(codes))
    np.testing.assert_array_equal(bits(q.scale), bits(scale))


@pytest.mark.parametrize(
    "n, row_groups, parts, row_bytes",
    [
        (1000, 1, (1000,), 100),  # several pieces, the last ragged
        (40, 1, (40,), 100),  # at once
        (288, 2, (288,), 100),  # groups of 144 rows: a block of 16 in each
        (1000, 2, (500, 500), 100),
        (1000, 1, (384, 384, 232), 100),
        (1000, 1, (384, 384, 232), 1),  # small, but its parts are apart
        (300, 1, (300,), 10**6),  # a row is more than a piece
    ],
)
def test_pieces_cover_every_row_once_and_end_at_blocks(
    n, row_groups, parts: Sequence[int], row_bytes, monkeypatch
):
    monkeypatch.setattr(filling, "PIECE_BYTES", 20_000)
    pieces = list(_cut(n, row_bytes, WEIGHTS["block"], row_groups=row_groups, parts=parts))
    assert [
        row for piece in pieces for row in range(piece.first, piece.first + piece.rows)
    ] == list(range(n))
    assert (
        max(piece.rows * row_bytes for piece in pieces)
        <= max(20_000, 128 * row_bytes) + 127 * row_bytes
    )
    ends = np.cumsum(parts)
    group = n // row_groups
    for piece in pieces:
        begin = int(ends[piece.part]) - parts[piece.part]
        assert begin + piece.start == piece.first and piece.start + piece.rows <= parts[piece.part]
        if piece.row_groups == 1 and len(pieces) > 1:
            of_group = piece.first % group
            assert of_group + piece.rows <= group and (len(parts) > 1 or of_group % 128 == 0)
            groups_before = (piece.first - begin) // group
            assert (
                piece.scale_row
                == groups_before * math.ceil(group / 128)
                + (piece.start - groups_before * group) // 128
            )


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", None])
def test_nan_and_inf_are_found_in_any_piece_and_named_with_the_first_index(
    scheme, tmp_path: Path, small_pieces
):
    folder = shutil.copytree(GOLDENS / "llama2", tmp_path / "spoilt")

    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][[300, 351], 7] = np.nan
        tensors["model.embed_tokens.weight"][63, 63] = -np.inf

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as error:
        fp8jax.load_quantized(folder, scheme)
    assert len(error.value.faults) == 2
    assert "model.layers.1.mlp.up_proj.weight: holds nan first at index [300, 7]" in str(
        error.value
    )
    assert "model.embed_tokens.weight: holds -inf first at index [63, 63]" in str(error.value)


# --- what happens meanwhile


@pytest.mark.parametrize("file", [FILE, "config.json"])
def test_a_checkpoint_that_is_replaced_while_it_loads_is_an_error(
    file: str, tmp_path: Path, monkeypatch
):
    """Half of the one and half of the other would load without a word: names and shapes are the
    same."""
    one, two = (shutil.copytree(GOLDENS / "llama2", tmp_path / name) for name in ("one", "two"))
    rewrite(
        two, lambda tensors: [tensor.__imul__(ml_dtypes.bfloat16(2)) for tensor in tensors.values()]
    )
    reconfigure(two, rms_norm_eps=1e-3)
    read_into, reads = Checkpoint.read_into, []

    def replace_after_five(self, name, out, *, first=0):
        reads.append(name)
        if len(reads) == 5:
            (two / file).replace(one / file)
        read_into(self, name, out, first=first)

    monkeypatch.setattr(Checkpoint, "read_into", replace_after_five)
    with pytest.raises(
        CheckpointError, match=f"one/{file}: was changed while .* another file has taken its name"
    ):
        fp8jax.load_quantized(one, "fp8_per_block")
    assert len(reads) > 10


def test_a_file_cut_short_while_it_loads_is_an_error(tmp_path: Path, monkeypatch):
    folder = shutil.copytree(GOLDENS / "llama2", tmp_path / "short")
    read_into, reads = Checkpoint.read_into, []

    def cut_after_five(self, name, out, *, first=0):
        reads.append(name)
        if len(reads) == 5:
            with (folder / FILE).open("r+b") as file:
                file.truncate(5000)
        read_into(self, name, out, first=first)

    monkeypatch.setattr(Checkpoint, "read_into", cut_after_five)
    with pytest.raises(CheckpointError, match=f"{FILE}: was changed while .* has 5000 by now"):
        fp8jax.load_quantized(folder, "fp8_per_block")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes."),
    ],
)
def test_out_of_memory_names_the_layer_its_size_and_how_far_loading_was(
    error: Exception, monkeypatch
):
    convert, calls = filling._convert, []

    def fail_at_the_fifth(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise error
        return convert(*arguments)

    monkeypatch.setattr(filling, "_convert", fail_at_the_fifth)
    with pytest.raises(MemoryError) as caught:
        fp8jax.load_quantized(GOLDENS / "llama2", "fp8_per_block")
    layers = [
        layer.name
        for layer in fp8jax.load_quantized(GOLDENS / "llama2", "fp8_per_block").report.layers
    ]
    message = str(caught.value)
    assert message.startswith(
        f"{layers[4]}.weight: out of memory while loading it (or {layers[3]} before it)"
    )
    assert (
        "it has 0.1 MiB in the checkpoint" in message
        and "were read before" in message
        and str(error) in message
    )
    assert caught.value.__cause__ is error


def test_another_error_of_the_device_stays_what_it_is(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(filling, "_convert", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        fp8jax.load_quantized(GOLDENS / "llama2", "fp8_per_block")


# --- counts


@pytest.mark.parametrize("layers", [3, 20_000, 10**9, 10**30])
def test_more_layers_than_the_files_have_are_noticed_before_anything_is_built(
    layers: int, tmp_path: Path
):
    folder = shutil.copytree(GOLDENS / "llama2", tmp_path / "deep")
    reconfigure(folder, num_hidden_layers=layers)
    with pytest.raises(
        CheckpointError, match=f"num_hidden_layers is {layers}, the files have 2 layers"
    ):
        fp8jax.load_quantized(folder, None)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
@pytest.mark.parametrize("experts", [5, 10**9])
def test_more_experts_than_the_files_have_are_noticed_before_anything_is_built(
    family, experts: int, tmp_path: Path
):
    """By their names, or by the first dimension of a stack."""
    folder = shutil.copytree(GOLDENS / family, tmp_path / "wide")
    reconfigure(folder, num_local_experts=experts)
    with pytest.raises(
        CheckpointError, match=f"there are {experts} experts, the files have 4 experts"
    ):
        fp8jax.load_quantized(folder, None)


def test_a_dense_checkpoint_under_the_config_of_a_mixture(tmp_path: Path):
    folder = shutil.copytree(GOLDENS / "mixtral", tmp_path / "dense")
    tensors = {name: x for name, x in load_file(folder / FILE).items() if ".experts." not in name}
    save_file(tensors, folder / FILE)
    with pytest.raises(
        CheckpointError, match="there are 4 experts, the files have no tensor of experts"
    ):
        fp8jax.load_quantized(folder, None)


def test_ten_thousand_names_of_another_model_are_told_in_time(tmp_path: Path):
    """Similar names were looked for among all unknown tensors for each missing one: minutes, then
    hours."""
    folder = shutil.copytree(GOLDENS / "mixtral", tmp_path / "foreign")
    experts, old = 1500, load_file(folder / FILE)
    tensors = {name: x for name, x in old.items() if ".experts." not in name}
    for layer in range(2):
        for e in range(experts):
            for w in ("v1", "v2", "v3"):
                tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight"] = np.zeros(
                    1, np.float32
                )
    save_file(tensors, folder / FILE)
    reconfigure(folder, num_local_experts=experts)
    with pytest.raises(CheckpointError) as error:
        fp8jax.load_quantized(folder, None)
    assert error.value.count == 2 * (
        2 * 3 * experts + 1
    )  # missing, unknown, and two routers of another size
    assert "w1.weight: missing" in str(
        error.value
    ) and "v1.weight, which the model does not" in str(error.value)


@pytest.mark.parametrize(
    "number", [{"num_hidden_layers": True}, {"num_hidden_layers": 2.0}, {"num_hidden_layers": "2"}]
)
def test_counts_of_another_type_are_left_to_the_config(number, tmp_path: Path):
    folder = shutil.copytree(GOLDENS / "llama2", tmp_path / "typed")
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | number)
    )
    with pytest.raises(ValueError, match="num_hidden_layers .* is wrong: expected an integer"):
        fp8jax.load_quantized(folder, None)
