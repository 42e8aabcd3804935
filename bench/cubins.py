"""Every Triton kernel, compiled ahead of time as 7B, 34B and the embedded model launch it. Needs no GPU.

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
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
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

BF16, FP32 = torch.bfloat16, torch.float32
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


@cache
def launches() -> list[Launch]:
    """What steps of 2 rows launch, and the wider tiles of `linear`, by the ops' own choice of constants."""
    return [*of_layers(), *of_products(), *of_draws()]


def of_layers() -> Iterator[Launch]:
    """All of a layer but its products: of 7B and 34B in bf16, and of the embedded model in fp32, if asked for."""
    for model, dtype, hidden, heads, kv_heads, head_dim, mp in (
        ("7B", BF16, 4096, 32, 32, 128, 1),
        ("34B", BF16, 8192, 64, 8, 128, 4),
        ("demo", FP32, 192, 6, 6, 32, 1),
    ):
        floats = partial(empty, dtype=dtype)
        x, weight = floats(2, hidden), floats(hidden)
        yield from recorded(model, cuda.rms_norm, x, weight, 1e-5)
        join = cuda.rms_norm_add if model == "34B" else cuda.add_rms_norm
        yield from recorded(model, join, x, x, weight, 1e-5)
        qkv, norm = floats(2, (heads + 2 * kv_heads) * head_dim), (floats(mp, head_dim), floats(mp, head_dim))
        rope, indices = floats(4096, head_dim), empty(2, dtype=torch.int64)
        for keep in (floats,) if model == "demo" else (floats, int8_pages):
            name = model if keep is floats else model + " int8"
            pages = keep(64, 256, kv_heads, head_dim), keep(64, 256, kv_heads, head_dim)
            if name != "34B int8":  # tells nothing that those of 7B in int8 and of 34B do not
                yield from recorded(name, cuda.qk_norm_rope, qkv, norm, norm, rope, indices, indices, *pages)
            attention = attentions(name, floats(2, heads, head_dim), pages)
            yield from attention if name == "7B" else attention[:1]  # the second kernel knows nothing of pages
    yield from recorded("7B", cuda.silu_mul, empty(2, 2 * 11008))
    yield from recorded("demo", cuda.silu_mul, empty(2, 2 * 512, dtype=FP32))
    pages = empty(64, 256, 32, 128, dtype=FP32), empty(64, 256, 32, 128, dtype=FP32)
    yield from attentions("7B fp32", empty(2, 32, 128, dtype=FP32), pages)[:1]


def attentions(name: str, q: torch.Tensor, pages: tuple) -> list[Launch]:
    tables, bounds = empty(2, 16, dtype=torch.int32), empty(3, dtype=torch.int32)
    return recorded(name, cuda.paged_attention, q, *pages, tables, bounds, empty(2, dtype=torch.int32))


def of_products() -> Iterator[Launch]:
    for dtype, inputs, rows in ((BF16, 4096, (2, 16, 64)), (FP32, 192, (16,))):
        for bits, n in product((8, 4), rows):
            values = empty(inputs, inputs * bits // 8, dtype=torch.uint8)
            weight = cuda.pack(QuantizedWeight(values, empty(inputs, inputs // 64)))
            name = f"int{bits} {n} rows" + " fp32" * (dtype == FP32)
            yield from recorded(name, cuda.linear, empty(n, inputs, dtype=dtype), weight)


def of_draws() -> Iterator[Launch]:
    """Draws from all codes, and from sizes, of which one alone may be legal: a kernel of its own."""
    one = empty(1, dtype=torch.int64)
    controls = Controls(*(one if field == "top_k" else empty(1, dtype=FP32) for field in Controls._fields))
    for dtype, columns in ((BF16, 8192), (FP32, 25), (BF16, 1)):
        logits, ids = empty(2, columns, dtype=dtype), empty(columns, dtype=torch.int64)
        name = f"{columns}" + " fp32" * (dtype == FP32)
        yield from recorded(name, cuda.guided_sample, logits, one, one, ids, controls, NoiseKeys(one, one, one))


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def int8_pages(*shape: int) -> QuantizedPages:
    return QuantizedPages(empty(*shape, dtype=torch.int8), empty(*shape[:-1], dtype=FP32))


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
    """Compile a kernel for what Triton would specialize it on: aligned pointers, numbers divisible by 16, and 1."""
    kernel, names = launch.kernel, launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | {n: launch.options[n] for n in names if n in launch.options}
    specialized = [p for p in kernel.params if not p.do_not_specialize]
    constants = {p.name for p in specialized if p.is_constexpr or (type(values[p.name]) is int and values[p.name] == 1)}
    signature = {n: "constexpr" if n in constants else mangle_type(values[n]) for n in names}
    free = [p for p in specialized if p.name not in constants]
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


def measured(index: int, target: int) -> dict:
    """Compile one of the launches and read its cubin. By its place: a kernel cannot be sent to a process."""
    launch = launches()[index]
    return inspected(launch, target, compiled(launch, target))


def inspected(launch: Launch, target: int, kernel) -> dict:
    """Read the cubin of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "--no-dataflow", file.name)
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
    each = product(range(len(launches())), options.targets)
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(measured, *zip(*each, strict=True)))
    for result in results:
        print(f"| {' | '.join(str(result[column]) for column in columns)} |")
    print(json.dumps({"triton": triton.__version__, "results": results}))


if __name__ == "__main__":
    main()
