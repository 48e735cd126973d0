"""What a compiled program consists of, read from what XLA and ptxas write.

Three sources, joined by the names of kernels: XLA's list of launches (order, grid, threads, shared
memory), ptxas' `-v` log (registers, spills) and the PTX itself (instructions). The optimized HLO
adds which buffers the program writes, and how large they are.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fp8jax.device import Gpu

# Tensor-core instructions by operand type. Anything of "mma.sync" or "wgmma" on f16 in an FP8
# kernel is the fallback to look for.
_INSTRUCTIONS = {
    "wgmma.e4m3": r"wgmma\.mma_async\.\S+\.e4m3\.e4m3",
    "wgmma.f16": r"wgmma\.mma_async\.\S+\.f16\.f16",
    "wgmma.bf16": r"wgmma\.mma_async\.\S+\.bf16\.bf16",
    "wgmma.tf32": r"wgmma\.mma_async\.\S+\.tf32\.tf32",
    "mma.e4m3": r"mma\.sync\.\S+\.e4m3\.e4m3",
    "mma.f16": r"mma\.sync\.\S+\.f16\.f16",
    "mma.bf16": r"mma\.sync\.\S+\.bf16\.bf16",
    "mma.tf32": r"mma\.sync\.\S+\.tf32\.tf32",
    "tcgen05.f8": r"tcgen05\.mma\.\S*kind::f8f6f4",
    "tcgen05.f16": r"tcgen05\.mma\.\S*kind::f16",
    "tcgen05.tf32": r"tcgen05\.mma\.\S*kind::tf32",
    "float32 add": r"\badd(\.rn)?(\.ftz)?\.f32(x2)?\s",
}
FP8_INSTRUCTIONS = ("wgmma.e4m3", "mma.e4m3", "tcgen05.f8")
_OTHER_TENSOR_CORE = tuple(
    name for name in _INSTRUCTIONS if "." in name and name not in FP8_INSTRUCTIONS
)


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One kernel as compiled.

    Args:
        name: its name in the list of launches.
        grid, threads: blocks of the launch, threads of a block.
        shared_bytes: shared memory of a block.
        registers: registers of a thread.
        spill_bytes: bytes of registers kept in local memory, stores plus loads.
        instructions: how often each kind occurs in the code (a loop body counts once).
        copy_widths: bytes of an asynchronous copy to shared memory -> how often.
        blocks_per_sm: how many blocks fit on an SM by threads, registers and shared memory.
    """

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    instructions: Mapping[str, int]
    copy_widths: Mapping[str, int]
    blocks_per_sm: int

    @property
    def fp8_only(self) -> bool:
        """FP8 tensor-core instructions and no others."""
        return any(self.instructions.get(name) for name in FP8_INSTRUCTIONS) and not any(
            self.instructions.get(name) for name in _OTHER_TENSOR_CORE
        )


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A result that a step of the program writes: its HLO name, opcode (a fusion with its kind),
    dtype, shape and bytes."""

    name: str
    opcode: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """A compiled program.

    Args:
        device: name of the GPU.
        kernels: by name.
        launches: names of kernels and of other steps ("kCopy", "kMemset", ...) in order; the body
            of a loop comes once.
        buffers: results of the program's steps, loops included, largest first. An update in place
            shows with the size of the whole.
        bytes_by_use: "arguments", "outputs", "aliased" (arguments reused as outputs) and
            "temporary".
    """

    device: str
    kernels: Mapping[str, KernelReport]
    launches: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    bytes_by_use: Mapping[str, int]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CompileReport":
        kernels = {
            name: KernelReport(**{**kernel, "grid": tuple(kernel["grid"])})
            for name, kernel in fields["kernels"].items()
        }
        buffers = tuple(
            Buffer(**{**buffer, "shape": tuple(buffer["shape"])}) for buffer in fields["buffers"]
        )
        return cls(
            **{
                **fields,
                "kernels": kernels,
                "launches": tuple(fields["launches"]),
                "buffers": buffers,
            },
        )

    def buffers_of_at_least(
        self, size: int, *, except_custom_calls: bool = True
    ) -> tuple[Buffer, ...]:
        """Results of `size` bytes or more; without those that a kernel of ours writes, what is left
        moves or converts data."""
        return tuple(
            b
            for b in self.buffers
            if b.bytes >= size and not (except_custom_calls and b.opcode == "custom-call")
        )


def read_report(
    *,
    gpu: Gpu,
    launches: str,
    hlo: str,
    ptxas: Iterable[tuple[str, str]],
    bytes_by_use: Mapping[str, int],
) -> CompileReport:
    """Join the compiler's outputs.

    Args:
        gpu: what was compiled for.
        launches: XLA's list of launches.
        hlo: the optimized HLO.
        ptxas: PTX and `-v` log of each call, in order of time: XLA may compile a kernel twice, and
            the last one counts.
        bytes_by_use: as in `CompileReport`.
    """
    code = {}
    for ptx, log in ptxas:
        used = _resources(log)
        for name, body in _entries(ptx):
            if name in used:
                code[name] = (body, *used[name])

    kernels, order = {}, []
    for name, grid, threads, shared in _launch_list(launches):
        order.append(name)
        if name in code and grid is not None:
            body, registers, spills = code[name]
            kernels[name] = KernelReport(
                name=name,
                grid=grid,
                threads=threads,
                shared_bytes=shared,
                registers=registers,
                spill_bytes=spills,
                instructions=_instructions(body),
                copy_widths=_copy_widths(body),
                blocks_per_sm=blocks_per_sm(
                    gpu, registers=registers, threads=threads, shared_bytes=shared
                ),
            )
    return CompileReport(gpu.kind, kernels, tuple(order), _buffers(hlo), dict(bytes_by_use))


def blocks_per_sm(gpu: Gpu, *, registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks that an SM holds at once; Blackwell's tensor memory is not counted."""
    warps = -(-threads // 32)
    registers_per_warp = -(-registers // 8) * 8 * 32  # allocated in units of 256
    return min(
        gpu.blocks_per_core,
        gpu.threads_per_core // (warps * 32),
        65536 // registers_per_warp // warps if registers else gpu.blocks_per_core,
        gpu.shared_per_core // (shared_bytes + 1024),
    )


def _resources(log: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes by kernel."""
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'([^']+)'", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if name and spills and registers:
            found[name[1]] = (int(registers[1]), int(spills[1]) + int(spills[2]))
    return found


def _entries(ptx: str) -> list[tuple[str, str]]:
    """Name and text of each kernel in a PTX file."""
    parts = re.split(r"\.entry\s+([\w$.]+)\s*\(", ptx)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _instructions(body: str) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, body)) for name, pattern in _INSTRUCTIONS.items()}
    return {name: count for name, count in counts.items() if count}


def _copy_widths(body: str) -> dict[str, int]:
    # cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    widths = re.findall(
        r"cp\.async\.c[ag]\.shared\.global\b[^,;]*,[^,;]*,\s*(0x[0-9a-fA-F]+|\d+)", body
    )
    return dict(Counter(str(int(width, 0)) for width in widths))


def _launch_list(text: str) -> list[tuple[str, tuple[int, int, int] | None, int, int]]:
    """Name, grid, threads and shared bytes of each step; what is no kernel goes by its kind,
    bookkeeping is left out."""
    steps = []
    for line in text.splitlines():
        step = re.match(r"\s*\d+:\s+(k\w+)", line)
        if not step or step[1] in (
            "kAsyncStart",
            "kAsyncDone",
            "kCommandBuffer",
            "kWhile",
            "kConditional",
            "kSequential",
        ):
            continue
        kernel = re.search(
            r"\]\s+(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]"
            r"\s+shared_memory: (\d+)",
            line,
        )
        if kernel:
            numbers = [int(number) for number in kernel.groups()[1:]]
            steps.append((kernel[1], tuple(numbers[:3]), math.prod(numbers[3:6]), numbers[6]))
        elif step[1] != "kDynamicSliceFusion":  # the copy inside it has a line of its own
            steps.append((step[1], None, 0, 0))
    return steps


_NO_WRITE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
)
_BITS = {"pred": 8, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}


def _buffers(hlo: str) -> tuple[Buffer, ...]:
    """Results of all instructions that are launched, not those inside fusions and reductions."""
    inside = set(re.findall(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-$]+)", hlo))
    buffers, computation = [], ""
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-$]+) \(.*\{$", line):
            computation = header[1]
        instruction = re.match(r"\s+(?:ROOT )?%?([\w.\-$]+) = (\(?.*?)\s([a-z][\w\-]*)\(", line)
        if (
            not instruction
            or computation in inside
            or instruction[3] in _NO_WRITE
            or instruction[3].endswith("-done")
        ):
            continue
        kind = re.search(r"kind=k(\w+)", line)
        opcode = f"{instruction[3]} {kind[1].lower()}" if kind else instruction[3]
        shapes = re.findall(r"([a-z][a-z0-9]*)\[([\d,]*)\]", instruction[2])
        if instruction[3].endswith(
            "-start"
        ):  # (operands, results, context): the results are the last shapes but the context
            shapes = shapes[-2:-1]
        buffers += [_buffer(instruction[1], opcode, dtype, dims) for dtype, dims in shapes]
    return tuple(sorted(buffers, key=lambda buffer: -buffer.bytes))


def _buffer(name: str, opcode: str, dtype: str, dims: str) -> Buffer:
    shape: Sequence[int] = tuple(int(dim) for dim in dims.split(",") if dim)
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
    return Buffer(name, opcode, dtype, tuple(shape), math.prod(shape) * max(bits, 8) // 8)
