"""The table of GPUs: which row a name finds, what the device itself says beside it, and what
follows from it."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from fp8jax import device
from fp8jax.device import GPUS, H100, current_gpu, gpu_named, has_no_fp8_products, required_gpu
from fp8jax.devtools.offline_targets import TARGETS, target_description
from fp8jax.pallas_kernels import block_scaled_matmul, decode_attention, scaled_matmul

ROWS = {gpu.name: gpu for gpu in GPUS}


def gpu_here(monkeypatch, kind: str, **attributes) -> None:
    """Make JAX's default device a GPU of this kind."""
    found = SimpleNamespace(platform="gpu", device_kind=kind, **attributes)
    monkeypatch.setattr(device, "current_device", lambda: found)


def mesh_of(kind: str, num_cores: int | None):
    named = AbstractDevice(device_kind=kind, num_cores=num_cores, platform="gpu")
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=named)
    )


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 40"),
        ("NVIDIA RTX 4000 Ada Generation", "Ada Generation"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("Quadro RTX 4000", None),  # Turing
        ("NVIDIA RTX PRO 6000 Blackwell", None),  # not the data center's tensor cores
        ("AMD Instinct MI300X", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_a_gpu_is_found_by_the_most_specific_part_of_its_name(kind, name):
    found = gpu_named(kind)
    assert (found and (found.name, found.kind)) == (name and (name, kind))


def test_every_row_is_found_by_its_own_kind():
    """A row behind a less specific one would never be found."""
    assert [gpu_named(gpu.kind) for gpu in GPUS] == list(GPUS)


def test_an_l4_has_58_sms_and_gets_tiles_for_so_many():
    l4, l40 = ROWS["L4"], ROWS["L40"]
    assert (l4.cores, l40.cores) == (
        58,
        142,
    )  # 7424 and 18176 CUDA cores by the data sheets, of 128
    # 64 tiles of 64 × 64 leave more than half of an L40 idle, so it splits k; an L4 they fill.
    splits = [block_scaled_matmul.default_config(gpu, 16, 4096, 4096).split_k for gpu in (l40, l4)]
    assert splits == [4, 1]
    # 80 tiles of 128 × 128 fill an L4; an L40 needs the smaller ones.
    tiles = [scaled_matmul.default_config(gpu, 1024, 1280, 1024).block_m for gpu in (l40, l4)]
    assert tiles == [64, 128]
    keys = [
        decode_attention.default_config(gpu, 1, 8, 8192, 128, "bfloat16").splits
        for gpu in (l40, l4)
    ]
    assert keys == [16, 4]


def test_the_device_itself_says_how_many_sms_it_has(monkeypatch):
    gpu_here(monkeypatch, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", core_count=16)
    gpu = current_gpu()
    assert gpu is not None
    assert gpu == replace(H100, kind="NVIDIA H100 80GB HBM3 MIG 1g.10gb", cores=16)
    whole = block_scaled_matmul.default_config(H100, 16, 4096, 4096)
    assert block_scaled_matmul.default_config(gpu, 16, 4096, 4096) == replace(whole, split_k=1)
    gpu_here(monkeypatch, "NVIDIA GeForce RTX 4090", core_count=128)  # the table has no number
    gpu = current_gpu()
    assert gpu is not None and gpu.cores == gpu.programs_to_fill == 128


def test_where_the_device_does_not_say_the_table_does(monkeypatch):
    gpu_here(monkeypatch, "NVIDIA L4")
    assert current_gpu() == ROWS["L4"]


def test_a_mesh_that_names_a_device_is_what_is_compiled_for(monkeypatch):
    gpu_here(monkeypatch, "NVIDIA L4", core_count=58)
    with mesh_of("NVIDIA H200", 66):
        assert current_gpu() == replace(ROWS["H200"], cores=66)
        assert required_gpu("op") == current_gpu()
    with mesh_of("NVIDIA H200", None):
        assert current_gpu() == ROWS["H200"]
    with mesh_of("NVIDIA A100-SXM4-40GB", 108):
        assert current_gpu() is None
        with pytest.raises(NotImplementedError, match=r"op: .*this is NVIDIA A100"):
            required_gpu("op")


def test_without_a_gpu_there_is_none_and_interpreted_kernels_get_an_h100(monkeypatch):
    monkeypatch.setattr(
        device, "current_device", lambda: SimpleNamespace(platform="cpu", device_kind="cpu")
    )
    assert current_gpu() is None
    assert required_gpu("op", interpret=True) == H100
    with pytest.raises(NotImplementedError, match=r"op: .*FP8.*this is a "):
        required_gpu("op")


@pytest.mark.parametrize("capability, old", [
    ("7.5", True), ("8.0", True), ("8.6", True), ("8.9", False), ("9.0", False), ("12.0", False),
    ("gfx90a", False), ("", False)
])  # fmt: skip
def test_compute_capabilities_before_ada_have_no_fp8_products(capability, old):
    assert has_no_fp8_products(capability) is old


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_row_contradicts_neither_its_architecture_nor_itself(gpu):
    majors = {"ada": (8,), "hopper": (9,), "blackwell": (10,)}
    assert gpu.capability[0] in majors[gpu.architecture]
    assert gpu.name in gpu.kind
    # In a block at most what an SM has, less 1 KiB (CUDA C++ Programming Guide).
    assert gpu.shared_per_block == gpu.shared_per_core - 1024
    if gpu.bf16_flops is not None:
        # Data sheets round both: an FP8 product takes half the time of a BF16 one.
        assert gpu.fp8_flops == pytest.approx(2 * gpu.bf16_flops, rel=0.02)


@pytest.mark.parametrize("short_name", TARGETS)
def test_every_offline_target_is_a_row_and_xla_is_told_what_it_says(short_name):
    target = TARGETS[short_name]
    assert target in GPUS and target.name.lower() == short_name
    text = target_description(target)
    for field in (
        f'name: "{target.kind}"',
        f"core_count: {target.cores} ",
        f"l2_cache_size: {target.l2_bytes} ",
        f"major: {target.capability[0]} minor: {target.capability[1]}",
        f"shared_memory_per_block_optin: {target.shared_per_block}\n",
    ):
        assert field in text
    assert "None" not in text
