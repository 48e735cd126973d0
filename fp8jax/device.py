"""The GPUs that the kernels know, one row each, and which of them computations go to.

Whether a kernel runs, its tiles, its roofline and what it is compiled for without a GPU all follow
from a row of this table. A GPU is recognised by its name within `device_kind`, as JAX reports it:
"NVIDIA H100 80GB HBM3" is an "H100". More specific names come first: "H100 PCIe" before "H100",
"GH200" before "H200".

Rates are dense, without sparsity. Where there is a real device, it says itself how many SMs it has
(`core_count`), and that counts: parts of a GPU (MIG) and lesser editions share a name with the
whole. A fact that no source states, or on which sources disagree, is None.

Sources: the vendor's data sheets; for H100, H200, B200, GB200 and L40 also the specifications that
ship with XLA (`xla/backends/gpu/target_config/specs`); for memory on an SM, the occupancy tables of
the CUDA C++ Programming Guide; for H20 and L20, which have no public data sheet, lists of GPUs that
agree on these figures.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax

Architecture = Literal["ada", "hopper", "blackwell"]

_FIRST_WITH_FP8 = (8, 9)  # compute capability of Ada
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Args:
        name: the part of `device_kind` that tells it from others.
        kind: `device_kind` as JAX reports it.
        architecture: "blackwell" means the data center's; the others' tensor cores are different.
        capability: compute capability, major and minor.
        cores: streaming multiprocessors (SMs).
        clock_ghz: boost clock.
        bandwidth: of its memory, bytes a second.
        bf16_flops, fp8_flops: dense operations a second of the tensor cores.
        l2_bytes, memory_bytes: sizes.
        threads_per_core, blocks_per_core: threads and thread blocks that an SM holds.
        shared_per_core: shared memory of an SM in bytes; each block takes 1 KiB more than it asks
            for.
        shared_per_block: shared memory in bytes that a block may ask for.
    """

    name: str
    kind: str
    architecture: Architecture
    capability: tuple[int, int]
    cores: int | None = None
    clock_ghz: float | None = None
    bandwidth: float | None = None
    bf16_flops: float | None = None
    fp8_flops: float | None = None
    l2_bytes: int | None = None
    memory_bytes: int | None = None
    threads_per_core: int = 2048
    blocks_per_core: int = 32
    shared_per_core: int = 233472
    shared_per_block: int = 232448

    @property
    def programs_to_fill(self) -> int:
        """How many programs give every SM one; the H100's number where no one knows the SMs."""
        return self.cores or 132


_blackwell = functools.partial(Gpu, architecture="blackwell", capability=(10, 0))
_hopper = functools.partial(Gpu, architecture="hopper", capability=(9, 0))
_ada = functools.partial(
    Gpu,
    architecture="ada",
    capability=(8, 9),
    threads_per_core=1536,
    blocks_per_core=24,
    shared_per_core=102400,
    shared_per_block=101376,
)

# What interpret mode imitates, and what is planned for where there is no GPU.
H100 = _hopper(
    name="H100",
    kind="NVIDIA H100 80GB HBM3",
    cores=132,
    clock_ghz=1.98,
    bandwidth=3.35232e12,
    bf16_flops=989e12,
    fp8_flops=1979e12,
    l2_bytes=50 * _MIB,
    memory_bytes=84942979072,
)

# The first row whose name a `device_kind` contains is its GPU.
GPUS: tuple[Gpu, ...] = (
    _blackwell(
        name="GB200",
        kind="NVIDIA GB200",
        cores=152,
        clock_ghz=2.062,
        bandwidth=7.928064e12,
        bf16_flops=2500e12,
        fp8_flops=5000e12,
        l2_bytes=135528448,
        memory_bytes=197897748480,
    ),
    _blackwell(
        name="B200",
        kind="NVIDIA B200",
        cores=148,
        clock_ghz=1.965,
        bandwidth=7.67232e12,
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        l2_bytes=132644864,
        memory_bytes=191514411008,
    ),
    _blackwell(name="GB300", kind="NVIDIA GB300", capability=(10, 3)),
    _blackwell(
        name="B300",
        kind="NVIDIA B300 SXM6 AC",
        capability=(10, 3),
        bandwidth=8e12,
        bf16_flops=2250e12,
        fp8_flops=4500e12,
    ),
    _hopper(  # 96 GB at 4.0 TB/s or 144 GB at 4.9 TB/s
        name="GH200", kind="NVIDIA GH200 480GB", cores=132
    ),
    _hopper(
        name="H200",
        kind="NVIDIA H200",
        cores=132,
        clock_ghz=1.98,
        bandwidth=4.8e12,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        l2_bytes=50 * _MIB,
        memory_bytes=151397597184,
    ),
    _hopper(
        name="H100 PCIe",
        kind="NVIDIA H100 PCIe",
        cores=114,
        clock_ghz=1.755,
        bandwidth=2.03904e12,
        bf16_flops=756e12,
        fp8_flops=1513e12,
        l2_bytes=50 * _MIB,
        memory_bytes=84942979072,
    ),
    _hopper(
        name="H100 NVL",
        kind="NVIDIA H100 NVL",
        cores=132,
        bandwidth=3.9e12,
        bf16_flops=835e12,
        fp8_flops=1671e12,
        l2_bytes=50 * _MIB,
    ),
    H100,
    _hopper(name="H800 PCIe", kind="NVIDIA H800 PCIe", cores=114),
    _hopper(
        name="H800",
        kind="NVIDIA H800",
        cores=132,
    ),
    _hopper(
        name="H20",
        kind="NVIDIA H20",
        cores=78,
        bandwidth=4.0e12,
        bf16_flops=148e12,
        fp8_flops=296e12,
        l2_bytes=60 * _MIB,
    ),
    _ada(
        name="L40S",
        kind="NVIDIA L40S",
        cores=142,
        clock_ghz=2.52,
        bandwidth=864e9,
        bf16_flops=362e12,
        fp8_flops=733e12,
        l2_bytes=96 * _MIB,
        memory_bytes=48 * 10**9,
    ),
    _ada(
        name="L40",
        kind="NVIDIA L40",
        cores=142,
        clock_ghz=2.49,
        bandwidth=864e9,
        bf16_flops=181e12,
        fp8_flops=362e12,
        l2_bytes=96 * _MIB,
        memory_bytes=48 * 10**9,
    ),
    _ada(
        name="L20",
        kind="NVIDIA L20",
        cores=92,
        clock_ghz=2.52,
        bandwidth=864e9,
        l2_bytes=96 * _MIB,
        memory_bytes=48 * 10**9,
    ),
    _ada(
        name="L4",
        kind="NVIDIA L4",
        cores=58,
        clock_ghz=2.04,
        bandwidth=300e9,
        bf16_flops=121e12,
        fp8_flops=242e12,
        l2_bytes=48 * _MIB,
        memory_bytes=24 * 10**9,
    ),
    # "RTX 40" alone would also be the Quadro RTX 4000, which has no FP8.
    _ada(name="GeForce RTX 40", kind="NVIDIA GeForce RTX 4090"),
    _ada(name="Ada Generation", kind="NVIDIA RTX 6000 Ada Generation"),
)


def gpu_named(kind: str) -> Gpu | None:
    """The GPU of a `device_kind`.

    Args:
        kind: as JAX reports it, such as "NVIDIA H100 80GB HBM3".
    Returns:
        Its row, with `kind` as given; None where it is not known to have FP8 tensor cores that the
        kernels reach.
    """
    row = next((row for row in GPUS if row.name in kind), None)
    return None if row is None else replace(row, kind=kind)


def current_gpu() -> Gpu | None:
    """The GPU that is compiled for: that of the mesh in use if it names one, else JAX's default
    device.

    Returns:
        Its row, with `cores` as the device itself reports them if it does; None where there is no
        GPU with FP8 tensor cores that the kernels reach.
    """
    gpu = gpu_named(current_device_kind())
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    cores = (
        getattr(current_device(), "core_count", None) if abstract is None else abstract.num_cores
    )
    return gpu if gpu is None or cores is None else replace(gpu, cores=cores)


def required_gpu(op: str, *, interpret: bool = False) -> Gpu:
    """The GPU whose kernel runs: the current one, or an H100 where kernels are interpreted.

    Args:
        op: name for the error.
        interpret: whether the kernel is interpreted on a CPU.
    Raises:
        NotImplementedError: there is no such GPU here.
    """
    gpu = H100 if interpret else current_gpu()
    if gpu is None:
        raise NotImplementedError(f"{op}: the kernel {needs_gpu()}; use implementation='xla'")
    return gpu


def needs_gpu() -> str:
    """What to say of a kernel where `current_gpu()` is None.

    Triton's compiler aborts the process on GPUs without FP8, so it has to be said before tracing.
    """
    found = current_device_kind() or f"a {jax.default_backend()}"
    return (
        "needs an NVIDIA GPU with FP8 tensor cores (Ada, Hopper, Blackwell data center) and this "
        f"is {found}"
    )


def current_device_kind() -> str:
    """`device_kind` of the GPU that is compiled for, known or not; "" for no GPU."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.device_kind
    device = current_device()
    return device.device_kind if device is not None and device.platform == "gpu" else ""


def current_device() -> Any:
    """The `jax.Device` that computations go to by default; None under a mesh that names a device,
    which need not be here."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return None
    default = jax.config.jax_default_device
    return jax.devices(default)[0] if default is None or isinstance(default, str) else default


def has_no_fp8_products(compute_capability: str) -> bool:
    """Whether an NVIDIA GPU of this CUDA compute capability, such as "8.0", lacks FP8 products.

    An NVIDIA GPU before Ada has FP8 numbers in memory and nothing that multiplies them. False for
    what is no such number (other vendors').
    """
    major, _, minor = compute_capability.partition(".")
    return major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) < _FIRST_WITH_FP8
