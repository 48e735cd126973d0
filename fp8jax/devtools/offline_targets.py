"""The GPUs that kernels are compiled for without having one, in the form that XLA takes.

Each is a row of the table in `fp8jax/device.py`. Compute capability, warp size, the grid limit and
shared memory decide what is compiled; core counts, clocks and bandwidths steer XLA's cost models.
"""

from fp8jax.device import GPUS, Gpu

# By a short name. JAX knows no "NVIDIA L40S" without the device; it has the L40's chip.
_ROWS = {gpu.name: gpu for gpu in GPUS}
TARGETS: dict[str, Gpu] = {name.lower(): _ROWS[name] for name in ("H100", "H200", "B200", "L40")}


def target_description(gpu: Gpu) -> str:
    """The text form of XLA's `GpuTargetConfigProto`, which
    `jax.experimental.topologies.get_topology_desc` takes as `target_config`."""
    major, minor = gpu.capability
    assert gpu.bandwidth is not None, f"{gpu.name} is no target: its memory's bandwidth is unknown"
    # The instructions that exist on one architecture only (wgmma, tcgen05) need the "a" variant,
    # sm_90a or sm_100a.
    features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""gpu_device_info {{
  name: "{gpu.kind}"  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
  core_count: {gpu.cores}  fpus_per_core: 128  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {int(gpu.bandwidth)}
  l2_cache_size: {gpu.l2_bytes}  device_memory_size: {gpu.memory_bytes}
  threads_per_warp: 32  threads_per_block_limit: 1024
  threads_per_core_limit: {gpu.threads_per_core}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_core: {gpu.shared_per_core}  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_per_block}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  driver_version: "13.0.0"  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.kind}"
"""
