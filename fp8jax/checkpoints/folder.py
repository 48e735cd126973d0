"""A checkpoint: a folder in Hugging Face layout, its configuration read and its tensors ready to be
read.

    config.json                     the architecture (required)
    generation_config.json          defaults for sampling (optional)
    model.safetensors               all tensors in one file, or
    model.safetensors.index.json    {"weight_map": {tensor: shard file}}, beside the shards
    tokenizer.json, …               not touched here

`Checkpoint.open` reads headers only and checks them against each other and against the index: every
tensor is in exactly the file where the index puts it, and in no other. Whatever is wrong, in
whichever file, comes out as one `CheckpointError` that lists it all. After that `read` cannot meet
a malformed tensor any more; what it can meet is a file that was replaced, cut short or written to
meanwhile, and that is an error too (`file_reading`).

    with Checkpoint.open("some/folder") as checkpoint:
        weight = checkpoint.read("model.embed_tokens.weight")
        name = "model.layers.0.block_sparse_moe.input_linear.weight"
        some_experts = checkpoint.read(name, slice(8, 16))
        checkpoint.verify_unchanged()

What `read` returns is the caller's own memory: it may be changed, kept, and lent to
`jax.device_put`.

Source: the layouts and the precedence of `model.safetensors` over an index are those of
`transformers`.
"""

import difflib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fp8jax.checkpoints.errors import CheckpointError, Faults, shown
from fp8jax.checkpoints.file_reading import FileReader, FileStamp, aligned_empty, read_whole, reason
from fp8jax.checkpoints.formats import declared_format, stored_format
from fp8jax.checkpoints.safetensors_file import (
    MAX_HEADER_BYTES,
    TensorInfo,
    parse_object,
    read_header,
    read_stamped_header,
)

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo", "read_header"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_ENDINGS = (
    ".safetensors",
    ".bin",
    ".gguf",
    ".pt",
    ".pth",
    ".npz",
    ".msgpack",
    ".h5",
)  # named in the error

# Real ones have kilobytes, an index some megabytes: 100 bytes a tensor.
MAX_CONFIG_BYTES = 10_000_000
MAX_INDEX_BYTES = MAX_HEADER_BYTES

# What is fetched from the hub. Some repositories carry the weights a second time in the maker's own
# layout ("consolidated…") or for other runtimes in subfolders; neither is read, so neither is
# fetched.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
HUB_IGNORED = ["*/*", "consolidated*"]


@dataclass(eq=False)
class Checkpoint:
    """An opened checkpoint folder; `tensors` comes from checked headers, data is read when it is
    asked for."""

    folder: Path
    config: dict[str, Any] = field(repr=False)
    generation_config: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    _reader: FileReader = field(default_factory=FileReader, repr=False)
    _closed: bool = field(default=False, repr=False)

    @classmethod
    def open(cls, repo: str | os.PathLike[str], *, revision: str | None = None) -> "Checkpoint":
        """Opens a local folder, or fetches a hub repository and opens that.

        Args:
            repo: a folder, or a hub repository id such as "org/name" (environment: HF_HUB_OFFLINE,
                HF_HOME, HF_TOKEN).
            revision: branch, tag or commit of the hub repository.

        Returns:
            The checkpoint, with configuration and headers read and checked, and no tensor data
            touched.

        Raises:
            CheckpointError: nothing found, or anything malformed; lists every fault of every file.
        """
        folder = _locate(repo, revision)
        faults, stamps = Faults(), {}
        config = _read_object(folder / "config.json", stamps, faults, strict=False)
        generation_config = _read_object(
            folder / "generation_config.json", stamps, faults, strict=False, optional=True
        )
        tensors = _read_tensors(folder, stamps, faults)
        if faults:
            raise CheckpointError.gather(str(folder), faults)
        return cls(folder, config, generation_config, tensors, FileReader(stamps))

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns a tensor, or some rows of it, as an array of its own.

        Args:
            name: as in `tensors`.
            rows: of the first dimension, in steps of one, taken as NumPy takes slices; of stacked
                experts, which experts.

        Returns:
            The array in its stored dtype, in memory that begins at a multiple of 64 bytes and
            belongs to no one else.

        Raises:
            CheckpointError: no such tensor, the checkpoint is closed, or its file is not what it
                was when it was opened.
            ValueError: rows of a tensor without dimensions, or with steps.
            MemoryError: there is not enough for it; names the tensor and its size.
        """
        info = self._info(name)
        shape, first = info.shape, 0
        if rows is not None:
            if not shape or rows.step not in (None, 1):
                raise ValueError(
                    f"{shown(name)}: rows {rows} of a tensor of shape {list(shape)}; give a slice "
                    "without steps"
                )
            start, stop, _ = rows.indices(shape[0])
            shape, first = (max(0, stop - start), *shape[1:]), start * math.prod(shape[1:])
        size = math.prod(shape) * info.dtype.itemsize
        try:
            array = aligned_empty(size).view(info.dtype).reshape(shape)
        except MemoryError as error:
            raise MemoryError(
                f"{info.file}: no memory for the {size} bytes of tensor {shown(name)}"
            ) from error
        self.read_into(name, array, first=first)
        return array

    def read_into(self, name: str, out: np.ndarray, *, first: int = 0) -> None:
        """Fills an array with consecutive elements of a tensor.

        Args:
            name: as in `tensors`.
            out: contiguous, of the tensor's dtype; its size is the number of elements read.
            first: the tensor's element to begin with, counted in row-major order.

        Raises:
            CheckpointError: as `read`.
            ValueError: another dtype, not contiguous, or beyond the tensor's end.
        """
        info = self._info(name)
        begin = info.begin + first * info.dtype.itemsize
        if (
            out.dtype != info.dtype
            or not out.flags.c_contiguous
            or first < 0
            or begin + out.nbytes > info.end
        ):
            raise ValueError(
                f"{shown(name)}: {info.dtype.name}{list(info.shape)} cannot fill "
                f"{out.dtype.name}{list(out.shape)} from its element {first} on; give a contiguous "
                "array of its dtype that ends where the tensor does, or before"
            )
        if out.size:
            self._reader.read_into(info.file, begin, out)

    def verify_unchanged(self) -> None:
        """Raises `CheckpointError` naming a file that was replaced, written to, removed or added
        since it was opened.

        To be called when all has been read: a file that was replaced after its last tensor was
        read, or a config.json that came with other weights, shows here only.
        """
        self._reader.verify()

    def require_unquantized(self) -> None:
        """Raises `CheckpointError` naming the format if the weights are quantized already."""
        declared, evidence = declared_format(self.folder, self.config), stored_format(self.tensors)
        if declared is None and evidence is None:
            return
        if evidence is None:
            found = f"{declared}; yet no tensor looks quantized"
            advice = " If the weights are BF16 again, remove that entry or file."
        else:
            found, advice = "; ".join(filter(None, [declared, evidence])), ""
        raise CheckpointError(
            f"{self.folder}: the checkpoint is already quantized: {found}. Online quantization "
            "starts from BF16 or FP16 weights: load the checkpoint this one was made from, or "
            f"convert it back to BF16 first.{advice}"
        )

    def close(self) -> None:
        """Closes the files; arrays that were read stay."""
        self._reader.close()
        self._closed = True

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if self._closed:
            raise CheckpointError(
                f"{self.folder}: the checkpoint is closed; open it again to read {shown(name)}"
            )
        if name not in self.tensors:
            close = difflib.get_close_matches(name, self.tensors, n=3)
            similar = f"the closest are {', '.join(map(shown, close))}"
            hint = similar if close else f"none of its {len(self.tensors)} names is similar"
            raise CheckpointError(f"{self.folder}: has no tensor {shown(name)}; {hint}")
        return self.tensors[name]


def _locate(repo: str | os.PathLike[str], revision: str | None) -> Path:
    """Returns the local folder of a checkpoint, fetching it first if it is a hub repository id."""
    name = os.fspath(repo)
    try:
        folder = Path(name).expanduser()
        is_folder, is_file = name != "" and folder.is_dir(), folder.is_file()
    except (
        OSError,
        RuntimeError,
    ) as error:  # a name too long, no permission to look; an unknown "~user"
        raise CheckpointError(
            f"{shown(name)}: cannot be looked up ({error}); give a checkpoint folder"
        ) from error
    if is_folder:
        if revision is not None:
            raise CheckpointError(
                f"{folder}: a local folder has no revision {revision!r}; leave revision out"
            )
        return folder
    if is_file:
        raise CheckpointError(f"{folder}: is a file; give the folder that holds it and config.json")
    looks_like_path = (
        not isinstance(repo, str) or name.startswith((".", "~", os.sep)) or name.count("/") > 1
    )
    if looks_like_path or "\\" in name or not name:
        raise CheckpointError(
            f"{shown(name)}: no such folder; give a checkpoint folder or a hub id such as "
            "'org/name'"
        )
    return _fetch(name, revision)


def _fetch(repo_id: str, revision: str | None) -> Path:
    """Downloads a hub repository, or finds it in the cache, with the hub's own client."""
    from huggingface_hub import (
        errors,
        snapshot_download,
    )  # a local folder must not pay for the import

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED
            )
        )
    except errors.GatedRepoError as error:
        cause, advice = (
            error,
            "accept its licence on its hub page and log in (`hf auth login`, or set HF_TOKEN)",
        )
    except errors.RepositoryNotFoundError as error:
        cause, advice = (
            error,
            "check the spelling; if the repository is private, log in (`hf auth login` or "
            "HF_TOKEN)",
        )
    except errors.RevisionNotFoundError as error:
        cause, advice = (
            error,
            f"the repository has no revision {revision!r}; choose a branch, tag or commit it has",
        )
    except errors.LocalEntryNotFoundError as error:
        cause = error
        advice = (
            "not in the local cache, and the hub is out of reach or HF_HUB_OFFLINE is set; fetch "
            "it while online"
        )
    except (
        Exception
    ) as error:  # the client's errors have no common base: HTTP, validation, transfer, cache
        cause, advice = error, "check the id, the connection and the disk"
    reason = str(cause).strip().partition("\n")[0]
    raise CheckpointError(
        f"{shown(repo_id)}: no local folder of this name, and not available as a hub repository: "
        f"{advice} ({type(cause).__name__}: {reason})"
    ) from cause


def _read_object(
    path: Path,
    stamps: dict[Path, FileStamp | None],
    faults: Faults,
    *,
    strict: bool,
    optional: bool = False,
    limit: int = MAX_CONFIG_BYTES,
) -> dict[str, Any]:
    """Reads a file that must hold one JSON object; returns an empty one if it is absent or at
    fault."""
    own = Faults()
    try:
        raw, stamps[path] = read_whole(path, limit)
        value = parse_object(raw, own, strict=strict)
    except FileNotFoundError:
        value, stamps[path] = {}, None
        if not optional:
            own.append("missing; a checkpoint needs it, fetch it from where the weights came from")
    except CheckpointError as error:
        value = {}
        own.append(str(error))
    faults.merge(own.prefixed(path.name))
    return value


def _read_tensors(
    folder: Path, stamps: dict[Path, FileStamp | None], faults: Faults
) -> dict[str, TensorInfo]:
    """Reads the headers of `model.safetensors`, or of the shards that the index names."""
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        faults.append(f"the folder {reason(error)}")
        return {}
    if SINGLE_FILE in present:
        return _read_file(folder / SINGLE_FILE, stamps, faults) or {}
    stamps[folder / SINGLE_FILE] = None  # were it to appear, the index would no longer count
    if INDEX_FILE in present:
        return _read_shards(folder, present, stamps, faults)
    weights = sorted(name for name in present if name.endswith(WEIGHT_ENDINGS))
    faults.append(
        f"no {SINGLE_FILE} and no {INDEX_FILE}; found "
        f"{', '.join(map(shown, weights[:8])) or 'no weight files'}. Weights are read from "
        "safetensors only: fetch or convert to that format, shards together with their index"
    )
    return {}


def _read_shards(
    folder: Path, present: set[str], stamps: dict[Path, FileStamp | None], faults: Faults
) -> dict[str, TensorInfo]:
    """Reads every shard of the index and checks that each tensor is where the index says, and
    nowhere else."""
    before = len(faults)
    index = _read_object(folder / INDEX_FILE, stamps, faults, strict=True, limit=MAX_INDEX_BYTES)
    if len(faults) > before:
        return {}
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(f, str) for f in weight_map.values())
    ):
        faults.append(
            f"{INDEX_FILE}: weight_map must be an object that maps tensor names to file names"
        )
        return {}

    names_by_shard: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        names_by_shard.setdefault(shard, set()).add(name)

    tensors: dict[str, TensorInfo] = {}
    for shard, expected in sorted(names_by_shard.items()):
        # Shards lie beside the index: a path would let a downloaded index point at any file of the
        # machine.
        if (
            Path(shard).name != shard
            or "\\" in shard
            or "\0" in shard
            or not shard.endswith(".safetensors")
        ):
            faults.append(
                f"{INDEX_FILE}: {shown(shard)} is not the plain name of a .safetensors file in the "
                "folder"
            )
            continue
        if shard not in present:
            faults.append(
                f"{shown(shard)}: missing; the index puts {len(expected)} tensors there, fetch it"
            )
            continue
        found = _read_file(folder / shard, stamps, faults)
        if found is None:
            continue
        for name, info in found.items():
            if name in tensors:
                faults.append(
                    f"tensor {shown(name)}: in both {tensors[name].file.name} and {shard}; keep one"
                )
            elif name not in expected:
                where = f"in {shown(weight_map[name])}" if name in weight_map else "nowhere"
                faults.append(
                    f"tensor {shown(name)}: in {shard}, but the index has it {where}; rebuild the "
                    "index"
                )
            tensors.setdefault(name, info)
        for name in sorted(expected - found.keys()):
            faults.append(
                f"tensor {shown(name)}: the index has it in {shard}, which lacks it; rebuild the "
                "index"
            )
    return tensors


def _read_file(
    path: Path, stamps: dict[Path, FileStamp | None], faults: Faults
) -> dict[str, TensorInfo] | None:
    try:
        tensors, stamps[path] = read_stamped_header(path)
    except CheckpointError as error:
        faults.merge(Faults(error.faults, count=error.count).prefixed(path.name))
        return None
    return tensors
