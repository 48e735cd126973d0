"""The offline compiler: reading what XLA and ptxas write, and telling what went wrong."""

import jax
import jax.numpy as jnp
import pytest

from fp8jax.devtools.offline_compile import OfflineCompileError, OfflineCompiler, Program, available
from fp8jax.devtools.offline_report import CompileReport, blocks_per_sm, read_report
from fp8jax.devtools.offline_targets import TARGETS

LAUNCHES = """001: kCustomKernel [source       | next=002 (1)] product grid: [6, 2, 1] threads: [128, 1, 1]  shared_memory: 32768 bytes
002: kCopy         [source       | next=003 (1)] kCopy
003: kWhile        [prev=002 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    005: kAsyncStart   [source       | next=008 (2)] stream=computation_stream[1], async_id=5
        007: kDynamicSliceFusion [source | sink] params=1, results=1
            006: kCopy [source | sink] kCopy
    008: kAsyncDone    [source       | sink        ] async_id=5
"""
PTX = """.version 8.7
.target sm_90a
.visible .entry loop_compare_fusion(
)
{
	add.s32 	%r1, %r2, 1;
}
.visible .entry product(
)
{
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
	wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r65,%r66}, %rd1, %rd2, 1, 1, 1;
	add.rn.f32 	%f1, %f2, %f3;
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
}
"""
LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'loop_compare_fusion' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compiling entry function 'product' for 'sm_90a'
    0 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
HLO = """%fused_add (param_0: f32[8,4]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  ROOT %big_inside = f32[8192,4096]{1,0} add(%param_0, %param_0)
}

ENTRY %main.4 (a.1: f8e4m3fn[128,128]) -> (f32[8,4], bf16[16]) {
  %a.1 = f8e4m3fn[128,128]{1,0} parameter(0)
  %copy.1 = f8e4m3fn[128,128]{0,1} copy(%a.1)
  %fusion-start = ((f8e4m3fn[8,128,128]{2,1,0}, s32[]), f8e4m3fn[1,64,128]{2,1,0}, u32[]) fusion-start(%a.1), kind=kLoop, calls=%fused_x
  %fusion-done = f8e4m3fn[1,64,128]{2,1,0} fusion-done(%fusion-start)
  %product = (f32[8,4]{1,0}, bf16[16]{0}) custom-call(%copy.1), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %loop_add_fusion = f32[8,4]{1,0} fusion(%copy.1), kind=kLoop, calls=%fused_add
}
"""


def report_of_texts() -> CompileReport:
    return read_report(
        gpu=TARGETS["h100"],
        launches=LAUNCHES,
        hlo=HLO,
        ptxas=[(PTX, LOG)],
        bytes_by_use={"temporary": 7},
    )


def test_kernels_are_joined_from_launches_code_and_log():
    kernel = report_of_texts().kernels["product"]
    assert (kernel.grid, kernel.threads, kernel.shared_bytes) == ((6, 2, 1), 128, 32768)
    assert (kernel.registers, kernel.spill_bytes) == (168, 64)
    assert kernel.instructions == {"wgmma.e4m3": 1, "mma.f16": 1, "float32 add": 1}
    assert kernel.copy_widths == {"16": 2, "4": 1}
    assert (
        not kernel.fp8_only
    )  # FP8 and float16 instructions in one kernel: a fallback has crept in


def test_launches_keep_their_order_and_leave_bookkeeping_out():
    assert report_of_texts().launches == ("product", "kCopy", "loop_compare_fusion", "kCopy")


def test_buffers_are_what_launched_steps_write():
    buffers = report_of_texts().buffers
    assert [(b.name, b.opcode, b.dtype, b.bytes) for b in buffers] == [
        ("copy.1", "copy", "f8e4m3fn", 128 * 128),
        ("fusion-start", "fusion-start loop", "f8e4m3fn", 64 * 128),
        ("product", "custom-call", "f32", 128),
        ("loop_add_fusion", "fusion loop", "f32", 128),
        ("product", "custom-call", "bf16", 32),
    ]
    assert [b.name for b in report_of_texts().buffers_of_at_least(100)] == [
        "copy.1",
        "fusion-start",
        "loop_add_fusion",
    ]


@pytest.mark.parametrize(
    "device, registers, threads, shared, expected",
    [
        ("h100", 168, 128, 73728, 3),  # registers and shared memory both allow three
        ("h100", 32, 128, 0, 16),  # threads: 2048 / 128
        ("h100", 255, 256, 1024, 1),  # registers: 65536 / (256 · 256)
        ("h100", 10, 32, 0, 32),  # the most blocks of an SM
        ("l40", 40, 128, 30720, 3),  # shared memory: 102400 / 31744
    ],
)
def test_blocks_per_sm(device, registers, threads, shared, expected):
    assert (
        blocks_per_sm(TARGETS[device], registers=registers, threads=threads, shared_bytes=shared)
        == expected
    )


def test_what_is_missing_is_said(monkeypatch):
    from fp8jax.devtools import offline_compile

    monkeypatch.setattr(offline_compile, "_toolkit", lambda: None)
    assert "pip install" in (available() or "")
    with pytest.raises(OfflineCompileError, match="pip install"), OfflineCompiler():
        pass


def scan_over_stacked_weights(layers: int) -> Program:
    """Layers in one array: XLA copies each weight out of it before a kernel may read it."""
    from jax.experimental import pallas as pl

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] + w_ref[...]

    def layer(x, w):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=out, name="layer")(x, w), None

    def program(x, weights, cache):
        x = jax.lax.scan(layer, x, weights)[0]
        return x, jax.lax.dynamic_update_slice(cache, x[:1], (3, 0))

    shapes = (64, 128), (layers, 64, 128), (1024, 128)
    return Program(
        program,
        tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        donate_argnums=(2,),
    )


def fails_to_build() -> Program:
    raise ValueError("no such layer: model.layers.99")


def ends_the_process() -> Program:
    import os

    os.write(2, b"LLVM ERROR: a fatal one\n")
    os._exit(1)


def prints(text: str) -> Program:
    print(text)
    return Program(lambda x: x + 1, (jax.ShapeDtypeStruct((8,), jnp.float32),))


def test_copied_weights_and_donated_buffers_show(compiler):
    report = compiler.compile(
        "h100", "tests.test_offline_compile:scan_over_stacked_weights", {"layers": 4}
    )
    assert report.device == "NVIDIA H100 80GB HBM3"
    assert "kCopy" in report.launches
    assert "layer" in report.kernels
    weight = 64 * 128 * 4
    assert any(
        b.shape == (1, 64, 128) and b.bytes == weight for b in report.buffers_of_at_least(weight)
    )
    assert report.bytes_by_use["aliased"] == 1024 * 128 * 4
    assert report.bytes_by_use["arguments"] == (64 + 4 * 64 + 1024) * 128 * 4


def test_errors_carry_the_text_and_the_compiler_goes_on(compiler):
    with pytest.raises(
        OfflineCompileError, match=r"h100: ValueError: no such layer: model\.layers\.99"
    ):
        compiler.compile("h100", "tests.test_offline_compile:fails_to_build")
    with pytest.raises(OfflineCompileError, match="LLVM ERROR: a fatal one"):
        compiler.compile("h100", "tests.test_offline_compile:ends_the_process")
    with pytest.raises(ValueError, match="choose one of h100, h200"):
        compiler.compile("a100", "tests.test_offline_compile:prints")
    report = compiler.compile(
        "l40", "tests.test_offline_compile:prints", {"text": "between the replies"}
    )
    assert len(report.launches) == 1
