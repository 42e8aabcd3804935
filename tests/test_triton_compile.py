"""The Triton kernels compiled ahead of time, for every GPU we name: nothing spills, and loads and products are wide."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lumina_rt.kernels import OPS

pytest.importorskip("triton", reason="Triton is not installed; it is on Linux with the extra `test`")
CUBINS = Path(__file__).parent.parent / "bench" / "cubins.py"
# What the docstrings claim a processor holds, on those with 100 KB of shared memory (sm_89, sm_120) and on the others.
PROGRAMS = {
    "rms_norm 7B": (3, 4),
    "rms_norm": (3, 3),
    "add_rms_norm": (3, 4),
    "qk_norm_rope": (24, 32),
    "paged_attention 7B int8": (3, 3),
    "paged_attention 34B int8": (3, 3),
    "paged_attention 7B fp32": (1, 2),
    "paged_attention": (2, 3),
    "join_splits": (9, 9),
    "silu_mul": (12, 16),
    "linear int8 2 rows": (2, 3),
    "linear int4 2 rows": (2, 4),
    "linear int8 16 rows fp32": (1, 2),
    "linear int4 16 rows fp32": (1, 1),
    "linear int8 16 rows": (2, 3),
    "linear int4 16 rows": (2, 4),
    "linear": (1, 1),
    "guided_sample": (1, 1),
}
# Rows of as many numbers as there are sizes lie at any place; and of a half of a head of 32 a thread has two numbers.
NARROW = {"guided_sample 25 fp32", "guided_sample 1", "qk_norm_rope demo"}


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """A process that interprets cannot compile, so another does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, str(CUBINS)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["results"]


@pytest.mark.timeout(900)  # 150 compilations by all cores, which take one 165 s
def test_every_kernel_compiles_for_every_target(cubins):
    kernels = {cubin["kernel"] for cubin in cubins}
    assert {(cubin["kernel"], cubin["target"]) for cubin in cubins} == {
        (kernel, target) for kernel in kernels for target in (80, 89, 90, 100, 120)
    }
    assert {kernel.split()[0] for kernel in kernels} == {*OPS, "join_splits"}
    assert all(any(kernel.startswith(name) for kernel in kernels) for name in PROGRAMS)


def test_no_kernel_spills(cubins):
    assert [cubin for cubin in cubins if cubin["stack"]] == []


def test_a_processor_holds_as_many_programs_as_the_docstrings_claim(cubins):
    for cubin in cubins:
        claim = next(claim for name, claim in PROGRAMS.items() if cubin["kernel"].startswith(name))
        assert cubin["programs"] >= claim[cubin["target"] not in (89, 120)], cubin


def test_loads_are_of_16_bytes(cubins):
    assert {cubin["kernel"] for cubin in cubins if not cubin["wide_loads"]} == NARROW


def test_products_run_on_tensor_cores(cubins):
    """In 16 bits; in fp32 they do not."""
    products = [cubin for cubin in cubins if cubin["kernel"].startswith(("paged_attention", "linear"))]
    in_16_bits = [cubin for cubin in products if not cubin["kernel"].endswith(("demo", "fp32"))]
    assert len(in_16_bits) == 10 * 5
    assert [cubin for cubin in products if cubin["tensor_core"]] == in_16_bits
