"""The GPUs that kernels are compiled for without having one: what XLA and the resource arithmetic
need to know of each.

`target_description` writes the text form of XLA's `GpuTargetConfigProto`. Compute capability, warp
size, the grid limit and shared memory decide what is compiled; core counts, clocks and bandwidths
steer XLA's cost models. Source: the vendor's data sheets and the specifications that ship with XLA
(`xla/backends/gpu/target_config/specs`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """One GPU.

    Args:
        name: what JAX reports as `device_kind`.
        capability: compute capability, major and minor.
        cores: streaming multiprocessors (SMs).
        clock_ghz: boost clock.
        memory_bandwidth: bytes per second.
        l2_bytes, memory_bytes: sizes.
        threads_per_core: threads that an SM holds.
        blocks_per_core: thread blocks that an SM holds.
        shared_per_core, shared_per_block: shared memory in bytes; each block takes 1 KB more than
            it asks for.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    memory_bandwidth: int
    l2_bytes: int
    memory_bytes: int
    threads_per_core: int = 2048
    blocks_per_core: int = 32
    shared_per_core: int = 233472
    shared_per_block: int = 232448


TARGETS = {
    "h100": Target(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        clock_ghz=1.98,
        memory_bandwidth=3_352_320_000_000,
        l2_bytes=52428800,
        memory_bytes=84942979072,
    ),
    "h200": Target(
        name="NVIDIA H200",
        capability=(9, 0),
        cores=132,
        clock_ghz=1.98,
        memory_bandwidth=4_800_000_000_000,
        l2_bytes=52428800,
        memory_bytes=151397597184,
    ),
    "b200": Target(
        name="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        clock_ghz=1.965,
        memory_bandwidth=7_672_320_000_000,
        l2_bytes=132644864,
        memory_bytes=191514411008,
    ),
    "l40": Target(  # the L40S has the same chip, but its name is unknown to JAX's table of devices
        name="NVIDIA L40",
        capability=(8, 9),
        cores=142,
        clock_ghz=2.49,
        memory_bandwidth=864_000_000_000,
        l2_bytes=100663296,
        memory_bytes=48000000000,
        threads_per_core=1536,
        blocks_per_core=24,
        shared_per_core=102400,
        shared_per_block=101376,
    ),
}


def target_description(target: Target) -> str:
    """The target in the text form that `jax.experimental.topologies.get_topology_desc` takes as
    `target_config`."""
    major, minor = target.capability
    # The instructions that exist on one architecture only (wgmma, tcgen05) need the "a" variant,
    # sm_90a or sm_100a.
    features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""gpu_device_info {{
  name: "{target.name}"  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
  core_count: {target.cores}  fpus_per_core: 128  clock_rate_ghz: {target.clock_ghz}
  memory_bandwidth: {target.memory_bandwidth}  l2_cache_size: {target.l2_bytes}  device_memory_size: {target.memory_bytes}
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: {target.threads_per_core}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_core: {target.shared_per_core}  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {target.shared_per_block}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{target.name}"
"""
