"""A checkpoint: a folder in Hugging Face layout, its configuration read and its tensors ready to be mapped.

    config.json                     the architecture (required)
    generation_config.json          defaults for sampling (optional)
    model.safetensors               all tensors in one file, or
    model.safetensors.index.json    {"weight_map": {tensor: shard file}} beside model-00001-of-0000n.safetensors …
    tokenizer.json, …               not touched here

`Checkpoint.open` reads headers only and checks them against each other and against the index: every tensor is in
exactly the file where the index puts it, and in no other. Whatever is wrong, in whichever file, comes out as one
`CheckpointError` that lists it all. After that `read` cannot meet a malformed tensor any more: it returns a view of the
mapped file, without a copy.

    with Checkpoint.open("some/folder") as checkpoint:
        weight = checkpoint.read("model.embed_tokens.weight")

Views stay valid for as long as anyone holds them, also after `close`; but they are the file. Copy before changing
or keeping one, and know that `jax.device_put` of an aligned view on the CPU keeps pointing into the map.

Source: the layouts and the precedence of `model.safetensors` over an index are those of `transformers`.
"""

import difflib
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fp8jax.prequantized import declared_format, stored_format
from fp8jax.safetensors_file import CheckpointError, TensorInfo, parse_object, read_header, shown

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo", "read_header"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_ENDINGS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".npz", ".msgpack", ".h5")  # named in the error

# What is fetched from the hub. Some repositories carry the weights a second time in the maker's own layout
# ("consolidated…") or for other runtimes in subfolders; neither is read, so neither is fetched.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
HUB_IGNORED = ["*/*", "consolidated*"]


@dataclass(eq=False)
class Checkpoint:
    """An opened checkpoint folder; `tensors` comes from checked headers, data is mapped when it is first read."""

    folder: Path
    config: dict[str, Any] = field(repr=False)
    generation_config: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)
    _closed: bool = field(default=False, repr=False)

    @classmethod
    def open(cls, repo: str | os.PathLike[str], *, revision: str | None = None) -> "Checkpoint":
        """Opens a local folder, or fetches a hub repository and opens that.

        Args:
            repo: a folder, or a hub repository id such as "org/name" (environment: HF_HUB_OFFLINE, HF_HOME, HF_TOKEN).
            revision: branch, tag or commit of the hub repository.

        Returns:
            The checkpoint, with configuration and headers read and checked, and no tensor data touched.

        Raises:
            CheckpointError: nothing found, or anything malformed; lists every fault of every file.
        """
        folder = _locate(repo, revision)
        faults: list[str] = []
        config = _read_object(folder / "config.json", faults, strict=False)
        generation_config = _read_object(folder / "generation_config.json", faults, strict=False, optional=True)
        tensors = _read_tensors(folder, faults)
        if faults:
            raise CheckpointError.gather(str(folder), faults)
        return cls(folder, config, generation_config, tensors)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as a read-only view of the mapped file.

        Args:
            name: as in `tensors`.

        Returns:
            The array in its stored dtype and shape; not necessarily aligned in memory.

        Raises:
            CheckpointError: no such tensor, the checkpoint is closed, or the file shrank since it was opened.
        """
        info = self._info(name)
        data = np.frombuffer(self._map(info.file), dtype=np.uint8)
        if len(data) < info.end:  # touching a page beyond the end would kill the process
            raise CheckpointError(
                f"{info.file}: tensor {shown(name)} ends at byte {info.end} but the file has {len(data)} by now;"
                " it was changed after it was opened, open the checkpoint again"
            )
        return data[info.begin : info.end].view(info.dtype).reshape(info.shape)

    def release(self, name: str) -> None:
        """Lets the system take back the memory pages of a tensor that has been read; its views stay valid.

        Without it the pages of a mapped file count as memory of the process until the system runs short, and a loader
        that reads a whole model would appear to hold it.
        """
        info = self._info(name)
        first = info.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if info.nbytes and info.file in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[info.file].madvise(mmap.MADV_DONTNEED, first, info.end - first)

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
            f"{self.folder}: the checkpoint is already quantized: {found}. Online quantization starts from BF16 or FP16"
            f" weights: load the checkpoint this one was made from, or convert it back to BF16 first.{advice}"
        )

    def close(self) -> None:
        """Forgets the mapped files; each is unmapped when the last view of it is gone."""
        self._maps.clear()
        self._closed = True

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if self._closed:
            raise CheckpointError(f"{self.folder}: the checkpoint is closed; open it again to read {shown(name)}")
        if name not in self.tensors:
            close = difflib.get_close_matches(name, self.tensors, n=3)
            similar = f"the closest are {', '.join(map(shown, close))}"
            hint = similar if close else f"none of its {len(self.tensors)} names is similar"
            raise CheckpointError(f"{self.folder}: has no tensor {shown(name)}; {hint}")
        return self.tensors[name]

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: the file is empty by now
                raise CheckpointError(f"{path}: cannot be mapped ({error}); was it changed after opening?") from error
        return self._maps[path]


def _locate(repo: str | os.PathLike[str], revision: str | None) -> Path:
    """Returns the local folder of a checkpoint, fetching it first if it is a hub repository id."""
    name = os.fspath(repo)
    try:
        folder = Path(name).expanduser()
        is_folder, is_file = name != "" and folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, no permission to look; an unknown "~user"
        raise CheckpointError(f"{shown(name)}: cannot be looked up ({error}); give a checkpoint folder") from error
    if is_folder:
        if revision is not None:
            raise CheckpointError(f"{folder}: a local folder has no revision {revision!r}; leave revision out")
        return folder
    if is_file:
        raise CheckpointError(f"{folder}: is a file; give the folder that holds it and config.json")
    looks_like_path = not isinstance(repo, str) or name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if looks_like_path or "\\" in name or not name:
        raise CheckpointError(f"{shown(name)}: no such folder; give a checkpoint folder or a hub id such as 'org/name'")
    return _fetch(name, revision)


def _fetch(repo_id: str, revision: str | None) -> Path:
    """Downloads a hub repository, or finds it in the cache, with the hub's own client."""
    from huggingface_hub import errors, snapshot_download  # a local folder must not pay for the import

    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED)
        )
    except errors.GatedRepoError as error:
        cause, advice = error, "accept its licence on its hub page and log in (`hf auth login`, or set HF_TOKEN)"
    except errors.RepositoryNotFoundError as error:
        cause, advice = error, "check the spelling; if the repository is private, log in (`hf auth login` or HF_TOKEN)"
    except errors.RevisionNotFoundError as error:
        cause, advice = error, f"the repository has no revision {revision!r}; choose a branch, tag or commit it has"
    except errors.LocalEntryNotFoundError as error:
        cause = error
        advice = "not in the local cache, and the hub is out of reach or HF_HUB_OFFLINE is set; fetch it while online"
    except Exception as error:  # the client's errors have no common base: HTTP, validation, transfer, cache
        cause, advice = error, "check the id, the connection and the disk"
    reason = str(cause).strip().partition("\n")[0]
    raise CheckpointError(
        f"{shown(repo_id)}: no local folder of this name, and not available as a hub repository: {advice}"
        f" ({type(cause).__name__}: {reason})"
    ) from cause


def _read_object(path: Path, faults: list[str], *, strict: bool, optional: bool = False) -> dict[str, Any]:
    """Reads a file that must hold one JSON object; returns an empty one if it is absent or at fault."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if not optional:
            faults.append(f"{path.name}: missing; a checkpoint needs it, fetch it from where the weights came from")
        return {}
    except OSError as error:
        faults.append(f"{path.name}: cannot be read ({error.strerror}); expected a JSON file")
        return {}
    own: list[str] = []
    value = parse_object(raw, own, strict=strict)
    faults.extend(f"{path.name}: {fault}" for fault in own)
    return value


def _read_tensors(folder: Path, faults: list[str]) -> dict[str, TensorInfo]:
    """Reads the headers of `model.safetensors`, or of the shards that the index names."""
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        faults.append(f"the folder cannot be listed ({error.strerror}); check its permissions")
        return {}
    if SINGLE_FILE in present:
        return _read_file(folder / SINGLE_FILE, faults) or {}
    if INDEX_FILE in present:
        return _read_shards(folder, present, faults)
    weights = sorted(name for name in present if name.endswith(WEIGHT_ENDINGS))
    faults.append(
        f"no {SINGLE_FILE} and no {INDEX_FILE}; found {', '.join(map(shown, weights[:8])) or 'no weight files'}."
        " Weights are read from safetensors only: fetch or convert to that format, shards together with their index"
    )
    return {}


def _read_shards(folder: Path, present: set[str], faults: list[str]) -> dict[str, TensorInfo]:
    """Reads every shard of the index and checks that each tensor is where the index says, and nowhere else."""
    own: list[str] = []
    weight_map = _read_object(folder / INDEX_FILE, own, strict=True).get("weight_map")
    if own:
        faults.extend(own)
        return {}
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        faults.append(f"{INDEX_FILE}: weight_map must be an object that maps tensor names to file names")
        return {}

    names_by_shard: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        names_by_shard.setdefault(shard, set()).add(name)

    tensors: dict[str, TensorInfo] = {}
    for shard, expected in sorted(names_by_shard.items()):
        # Shards lie beside the index: a path would let a downloaded index point at any file of the machine.
        if Path(shard).name != shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            faults.append(f"{INDEX_FILE}: {shown(shard)} is not the plain name of a .safetensors file in the folder")
            continue
        if shard not in present:
            faults.append(f"{shown(shard)}: missing; the index puts {len(expected)} tensors there, fetch it")
            continue
        found = _read_file(folder / shard, faults)
        if found is None:
            continue
        for name, info in found.items():
            if name in tensors:
                faults.append(f"tensor {shown(name)}: in both {tensors[name].file.name} and {shard}; keep one")
            elif name not in expected:
                where = f"in {shown(weight_map[name])}" if name in weight_map else "nowhere"
                faults.append(f"tensor {shown(name)}: in {shard}, but the index has it {where}; rebuild the index")
            tensors.setdefault(name, info)
        for name in sorted(expected - found.keys()):
            faults.append(f"tensor {shown(name)}: the index has it in {shard}, which lacks it; rebuild the index")
    return tensors


def _read_file(path: Path, faults: list[str]) -> dict[str, TensorInfo] | None:
    try:
        return read_header(path)
    except CheckpointError as error:
        faults.extend(f"{path.name}: {fault}" for fault in error.faults)
        return None
