"""Every Triton kernel, compiled ahead of time as a 7B or 34B model launches it: what it takes of a GPU. Needs no GPU.

    python bench/cubins.py [--targets 80 90]

The launches are those of the ops themselves, recorded on tensors without memory. Read from each cubin: registers a
thread, bytes of stack (spills), shared memory, how many programs of it a processor holds, and its instructions for
16-byte loads and for tensor cores. The last line of stdout is one JSON object.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.backends.nvidia
from lumina_rt.kernels import Controls, NoiseKeys, cuda
from lumina_rt.kernels.quantization import QuantizedPages, QuantizedWeight
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

BIN = Path(triton.backends.nvidia.__file__).parent / "bin"


class Processor(NamedTuple):
    """What programs share: KB of shared memory, warps and programs at most. There are 65,536 registers on all."""

    shared_kb: int
    warps: int
    programs: int


TARGETS = {
    80: Processor(164, 64, 32),
    89: Processor(100, 48, 24),
    90: Processor(228, 64, 32),
    100: Processor(228, 64, 32),
    120: Processor(100, 48, 24),
}


class Launch(NamedTuple):
    name: str
    kernel: JITFunction
    args: tuple
    options: dict


def launches() -> Iterator[Launch]:
    """What a step of 2 rows launches, and the wider tile of `linear`, by the ops' own choice of constants."""
    for model, hidden, heads, kv_heads, mp in (("7B", 4096, 32, 32, 1), ("34B", 8192, 64, 8, 4)):
        x, weight = empty(2, hidden), empty(hidden)
        yield from recorded(model, cuda.rms_norm, x, weight, 1e-5)
        join = cuda.add_rms_norm if model == "7B" else cuda.rms_norm_add
        yield from recorded(model, join, x, x, weight, 1e-5)
        qkv, norm = empty(2, (heads + 2 * kv_heads) * 128), (empty(mp, 128), empty(mp, 128))
        indices, tables = empty(2, dtype=torch.int64), empty(2, 16, dtype=torch.int32)
        bounds = empty(3, dtype=torch.int32), empty(2, dtype=torch.int32)
        for keep in (empty, int8_pages) if model == "7B" else (empty,):
            pages = keep(64, 256, kv_heads, 128), keep(64, 256, kv_heads, 128)
            name = model if keep is empty else model + " int8"
            yield from recorded(name, cuda.qk_norm_rope, qkv, norm, norm, empty(4096, 128), indices, indices, *pages)
            attention = recorded(name, cuda.paged_attention, empty(2, heads, 128), *pages, tables, *bounds)
            yield from attention if name == "7B" else attention[:1]  # the second kernel knows nothing of pages
    yield from recorded("7B", cuda.silu_mul, empty(2, 2 * 11008))
    for bits in (8, 4):
        values, scales = empty(4096, 4096 * bits // 8, dtype=torch.uint8), empty(4096, 64)
        for n in (2, 64):
            weight = cuda.pack(QuantizedWeight(values, scales))
            yield from recorded(f"int{bits} {n} rows", cuda.linear, empty(n, 4096), weight)
    controls = Controls(
        *(empty(1, dtype=torch.int64 if name == "top_k" else torch.float32) for name in Controls._fields)
    )
    keys = NoiseKeys(*(empty(1, dtype=torch.int64) for _ in NoiseKeys._fields))
    one, ids = empty(1, dtype=torch.int64), empty(8192, dtype=torch.int64)
    yield from recorded("8192", cuda.guided_sample, empty(2, 8192), one, one, ids, controls, keys)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def int8_pages(*shape: int) -> QuantizedPages:
    return QuantizedPages(empty(*shape, dtype=torch.int8), empty(*shape[:-1], dtype=torch.float32))


def recorded(name: str, op, *args) -> list[Launch]:
    """The launches of an op, in place of running it."""
    found: list[Launch] = []

    def record(self, *args, grid, warmup, **options):
        found.append(Launch(f"{self.fn.__name__.strip('_').removesuffix('_kernel')} {name}", self, args, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        op(*args)
    finally:
        JITFunction.run = run
    return found


def compiled(launch: Launch, target: int):
    """Compile a kernel for what Triton would specialize it on: aligned pointers, and numbers divisible by 16."""
    kernel, names = launch.kernel, launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | {n: launch.options[n] for n in names if n in launch.options}
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature = {n: "constexpr" if n in constants else mangle_type(values[n]) for n in names}
    free = [p for p in kernel.params if p.name not in constants and not p.do_not_specialize]
    aligned = [
        p.name
        for p in free
        if (isinstance(values[p.name], torch.Tensor) and not p.do_not_specialize_on_alignment)
        or (isinstance(values[p.name], int) and not values[p.name] % 16)
    ]
    source = ASTSource(
        kernel, signature, {(names.index(n),): values[n] for n in constants},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )  # fmt: skip
    options = {n: value for n, value in launch.options.items() if n not in names}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"enable_fp_fusion": True} | options)


def inspected(launch: Launch, target: int, kernel) -> dict:
    """Read the cubin of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    found = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]+)", code, re.MULTILINE))
    limits, warps, shared = TARGETS[target], kernel.metadata.num_warps, kernel.metadata.shared
    return {
        "kernel": launch.name, "target": target, "registers": registers, "stack": stack, "shared": shared,
        "programs": min(
            65536 // (-(-registers // 8) * 8 * 32 * warps), limits.warps // warps, limits.programs,
            limits.shared_kb * 1024 // (shared + 1024),  # each program costs 1 KB more than it asks for
        ),
        "wide_loads": sum(n for name, n in found.items() if re.match(r"LDG(STS)?\..*128", name)),
        "tensor_core": sum(n for name, n in found.items() if re.match(r"(H|HG|UTCH)MMA", name)),
    }  # fmt: skip


def tool(name: str, *args: str) -> str:
    return subprocess.run([BIN / name, *args], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", type=int, default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    columns = ["kernel", "target", "registers", "stack", "shared", "programs", "wide_loads", "tensor_core"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with ThreadPoolExecutor(1) as pool:  # one cubin is read while the next is compiled
        reading = [
            pool.submit(inspected, launch, target, compiled(launch, target))
            for launch in launches()
            for target in options.targets
        ]
        results = [each.result() for each in reading]
    for result in results:
        print(f"| {' | '.join(str(result[column]) for column in columns)} |")
    print(json.dumps({"triton": triton.__version__, "results": results}))


if __name__ == "__main__":
    main()
