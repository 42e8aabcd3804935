"""The Engine's way on CUDA, held without a GPU.

Its ops in Triton's interpreter draw what the reference draws. And the whole of it runs with the shapes of 7B and 34B on
fake CUDA tensors, which have a device, a shape and a dtype and no memory: launches of kernels are noted in place of
running, and whatever would make the host wait inside a step is an error.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
from lumina_rt.kernels import OPS, quantization, reference
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumina_rt import Engine, EngineConfig, backend, dummy, engine, graph, weights
from lumina_rt.model import Model
from lumina_rt.multi_step import MultiStep
from lumina_rt.sampler import Sampler
from lumina_rt.tokenizer import Tokenizer
from lumina_rt.vqgan import VQGAN

pytest.importorskip("triton", reason="Triton is not installed; it is on Linux with the extra `test`")
from lumina_rt.kernels import cuda

GPU = torch.device("cuda:0")
MODELS = {
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "34B": {
        "hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64, "num_key_value_heads": 8,
        "model_parallel_size": 8, "swin_norm": True,
    },
}  # fmt: skip


def picture(ops, monkeypatch):
    """The codes of a whole picture of the embedded model, made by some ops."""
    monkeypatch.setattr(backend, "cpu", ops)
    monkeypatch.setattr(engine, "target_sizes_of", lambda _: (32,))
    options = {"dtype": "float32", "speculation": 2, "page_size": 16, "num_pages": 64}
    shipped = Engine.from_pretrained("demo", device="cpu", **options)
    text, controls = "a red circle left of a blue star", {"seed": 3, "temperature": 2.0, "progress": False}
    return shipped.generate_image(text, 32, 32, **controls).answers[0].codes[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py draws whole images where there is a GPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy tells of what the kernels mask away
@pytest.mark.usefixtures("patched_once")
def test_the_embedded_model_draws_the_same_with_triton_as_with_the_reference(monkeypatch):
    """Of 32 x 32 pixels, less than it was trained on: the interpreter takes half a second a step."""
    expected = picture(reference, monkeypatch)
    assert expected.shape == (4, 4)
    assert len(np.unique(expected)) > 8, expected  # so that a wrong draw would be seen
    assert np.array_equal(picture(cuda, monkeypatch), expected)


class OnDevice(TorchDispatchMode):
    """Lets no operation touch a tensor of the host, but to bring numbers to the device where that is allowed."""

    depth = 0

    def __init__(self, brings: bool = False):
        super().__init__()
        self.brings = brings

    def __enter__(self):
        OnDevice.depth += 1
        return super().__enter__()

    def __exit__(self, *exception):
        OnDevice.depth -= 1
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        taken, given = (
            {t.device for t in tree_leaves(x) if isinstance(t, torch.Tensor)} for x in ((args, kwargs), out)
        )
        brings = self.brings and taken <= {torch.device("cpu")}
        if brings and given == {GPU}:
            assert kwargs.get("non_blocking"), "the host waits for a copy to the device"
        if not brings and (taken | given) - {GPU}:
            raise AssertionError(f"{func} of a step touches a tensor of the host")
        return out


def guarded(function, **allowed):
    def run(*args):
        with OnDevice(**allowed):
            return function(*args)

    return run


class Headers(weights.Checkpoint):
    """A checkpoint that has shapes and no files."""

    def __init__(self, folder):
        self.folder, self.problems = folder, []
        shapes = weights.tensor_shapes(weights.config_from_json(weights.read_json(folder / "config.json")))
        self.tensors = {name: weights.TensorFile(folder, shape) for name, shape in shapes.items()}

    def read(self, names, dtype, pinned):
        assert pinned
        rows = sum(self.tensors[name].shape[0] for name in names)
        return torch.empty(rows, *self.tensors[names[0]].shape[1:], dtype=dtype)

    def mapped(self, name, dtype):
        return self.read([name], dtype, pinned=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    dummy.write_tokenizer(folder, n_codes=8192)
    return Tokenizer.from_file(folder / "tokenizer.json"), VQGAN(dummy.TINY_VQGAN)


@pytest.fixture
def fake(monkeypatch, tmp_path, files):
    """Makes an Engine of fake CUDA tensors, on a GPU that has 60 GiB free of 80.

    `fake.launches` are the kernels that would have run, `fake.replayed` the tokens of graphs that would have been
    replayed, `fake.reads` the numbers of tokens that the host has waited for.
    """
    if torch.cuda.is_available():
        from triton.runtime.jit import JITFunction as Kernel
    else:
        from triton.runtime.interpreter import InterpretedFunction as Kernel

    def note(self, *args, grid, **_):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        assert all(isinstance(x, FakeTensor) and x.device == GPU and x.is_contiguous() for x in tensors), self
        assert all(0 < n < 2**16 for n in (*grid, 1, 1)[1:3]), grid
        make.launches.append(self.fn.__name__)

    def read(self):
        assert not OnDevice.depth, "a step is read before it is all launched"
        make.reads.append(self.numel())
        return [4] * self.numel()

    def record(runs):
        for run in runs:
            hidden = run()
            yield partial(make.replayed.append, hidden.shape[0]), hidden

    def contiguous(self, memory_format=torch.contiguous_format):
        return self.clone(memory_format=memory_format)

    def tensor(values, dtype, pin_memory):
        assert pin_memory, "a copy from memory that is not pinned makes the host wait"
        assert isinstance(values, list), "torch pins nothing that it makes from an array"
        return torch.empty(np.shape(values), dtype=dtype)

    # Pinned memory, and torch's own bindings of two operations, need a real GPU; one number alone would not stay fake.
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: torch.ops.aten.copy_(self, other))
    monkeypatch.setattr(Kernel, "run", note)
    monkeypatch.setattr(FakeTensor, "tolist", read)
    monkeypatch.setattr(weights, "Checkpoint", Headers)
    monkeypatch.setattr(quantization, "ROWS_AT_ONCE", 1 << 20)  # fewer operations; they have no memory to spare
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(Model, "forward", guarded(Model.forward))
    monkeypatch.setattr(Sampler, "_draw_group", guarded(Sampler._draw_group, brings=True))
    monkeypatch.setattr(MultiStep, "run", guarded(MultiStep.run, brings=True))
    monkeypatch.setattr(MultiStep, "_step", guarded(MultiStep._step))

    def make(kind, quantization, ops=cuda, **options):
        values = dummy.TINY_MODEL | MODELS[kind] | {"torch_dtype": "bfloat16", "vocab_size": 65536}
        (tmp_path / "config.json").write_text(json.dumps(values))
        for name in OPS:
            monkeypatch.setattr(cuda, name, guarded(getattr(cuda, name)))
        tokenizer, vqgan = files
        model = weights.load(tmp_path, ops, tokenizer.vocab.image_tokens, 4096, None, GPU, quantization)
        config = EngineConfig(**{"num_pages": 32, "enforce_eager": True} | options)
        made = Engine(model, tokenizer, vqgan, config, [128])
        made.pictures.read = lambda picture: picture.codes  # the VQGAN here is a real one
        return made

    make.launches, make.reads, make.replayed = [], [], []
    with FakeTensorMode():
        yield make


def draw(made):
    """A whole image of 8 x 8 codes, guided."""
    (codes,) = made.generate_image("a dog", 128, 128, seed=3, progress=False).images
    assert codes.shape == (8, 8)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("kind", ["7B", "34B"])
def test_an_image_is_drawn_on_the_device_and_read_once_a_step(fake, kind, quantization):
    made = fake(kind, quantization, speculation=3, kv_cache_dtype="int8" if quantization == "int4" else None)
    draw(made)
    assert len(fake.reads) < 40  # the fake draws are all the same, so that most guesses hold
    assert max(fake.reads) == 3
    assert fake.launches.count("_guided_sample_kernel") == len(fake.reads)
    assert fake.launches.count("_qk_norm_rope_kernel") == len(fake.reads) * made.model.config.n_layers
    assert ("_linear_kernel" in fake.launches) == bool(quantization)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("kind", ["7B", "34B"])
def test_with_flash_attn_only_steps_of_several_tokens_a_row_are_attended_to_by_our_own_kernel(
    fake, flash, monkeypatch, kind, quantization
):
    def note(q, k_cache, v_cache, *, cache_seqlens, block_table, causal):
        assert {x.device for x in (q, k_cache, v_cache, cache_seqlens, block_table)} == {GPU}
        assert q.dtype == k_cache.dtype == v_cache.dtype == torch.bfloat16
        assert len(q) == len(cache_seqlens) == len(block_table)
        flash.calls.append(block_table)
        return torch.empty_like(q)

    monkeypatch.setattr(flash, "flash_attn_with_kvcache", note)
    made = fake(kind, quantization, ops=flash, speculation="off")
    draw(made)
    n_layers = made.model.config.n_layers
    assert len(fake.reads) == 64
    assert len(flash.calls) == 56 * n_layers
    assert fake.launches.count("_paged_attention_kernel") == 8 * n_layers  # the prompt, and ends of lines
    assert ("_linear_kernel" in fake.launches) == bool(quantization)


def test_a_step_of_an_image_is_one_graph_and_the_draw(fake):
    made = fake("34B", "int8", enforce_eager=False, speculation=3, max_num_seqs=2)
    recorded = len(fake.launches)
    draw(made)
    assert set(fake.launches[recorded:]) == {"_linear_kernel", "_guided_sample_kernel"}  # head and draw
    assert len(fake.launches) == recorded + 2 * len(fake.reads)
    assert len(fake.replayed) == len(fake.reads)
    assert set(fake.replayed[1:]) == {8}  # three draws of two rows, a line end among them at times


@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize("kind", ["7B", "34B"])
def test_without_speculation_a_row_of_an_image_is_one_read_and_the_draws_stay_on_the_device(fake, kind, quantization):
    made = fake(kind, quantization, enforce_eager=False, speculation="off", max_num_seqs=4)
    n_recorded = len(fake.launches)
    assert fake.launches.count("_guided_sample_kernel") == 2  # in the graphs of 2 and of 4 rows
    draw(made)
    assert fake.reads == [1, 7] + 7 * [8]
    assert fake.replayed[1:] == 7 * [2] + 7 * ([4] + 7 * [2])  # behind the prompt, and behind the end of a line
    # Head and draw of the first step of a run; those of the others are in their graph.
    assert fake.launches[n_recorded:] == 9 * (["_linear_kernel"] * bool(quantization) + ["_guided_sample_kernel"])


class Launches(TorchDispatchMode):
    """Counts the operations of PyTorch that are kernels on a GPU: those that are no views and do not just allocate."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.namespace == "aten" and not (func.is_view or "empty" in func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["7B", "34B"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_step_that_feeds_the_next_takes_few_launches(fake, kind, quantization):
    made = fake(kind, quantization, enforce_eager=False, speculation="off", max_num_seqs=2)
    fake.launches.clear()
    with torch.inference_mode(), Launches() as of_torch:
        made.runner.multi_step._step(2)
    assert of_torch.n >= 5 + (0 if quantization else 4 * made.model.config.n_layers)
    assert len(fake.launches) + of_torch.n <= 10 * made.model.config.n_layers + 8, fake.launches


def test_one_engine_at_a_time_takes_what_is_free_and_records(fake, monkeypatch):
    """Two would give away the same memory, and each wait for the GPU while the other records, which CUDA refuses."""
    seen = []
    for owner, name in ((torch.cuda, "mem_get_info"), (graph, "record")):
        plain = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda x, name=name, plain=plain: seen.append((name, engine._TAKING.locked())) or plain(x)
        )
    fake("7B", None, enforce_eager=False, max_num_seqs=2)
    assert seen == [("mem_get_info", True), ("record", True), ("record", True)]
    with pytest.raises(ValueError, match=r"^num_pages takes"):
        fake("7B", None, num_pages=10000)
    assert not engine._TAKING.locked()


def test_the_pool_takes_what_is_left_of_the_memory_but_no_more_than_all_rows_need(fake):
    assert fake("7B", None, num_pages=None).scheduler.pool.num_pages == 64 * 10240 // 256
    page = 2 * 2 * 4096 * 2 * 256  # two layers
    made = fake("7B", None, num_pages=None, gpu_memory_utilization=0.26)
    assert made.scheduler.pool.num_pages == int(0.8 * 2**30) // page - 1
    assert made.cache.k.shape[1] == made.scheduler.pool.num_pages
    made = fake("7B", None, num_pages=9, enforce_eager=False, max_num_seqs=2)
    assert made.scheduler.pool.num_pages == 9
    assert made.cache.k.shape[1] == 10  # what graphs pad goes to a page that nobody is given


def test_a_pool_that_does_not_fit_is_told_with_need_and_have(fake):
    with pytest.raises(ValueError, match=r"^num_pages takes 78.1 GiB of KV cache; 52.0 are left of the GPU's 80.0 \("):
        fake("7B", None, num_pages=10000)
    with pytest.raises(
        ValueError, match=r"^max_model_len \(10240 tokens\) takes 0.3 GiB .* 0.0 are left .* is 0.25\)$"
    ):
        fake("7B", None, num_pages=None, gpu_memory_utilization=0.25)


def test_text_is_drawn_on_the_device(fake):
    made = fake("7B", None)
    made.generate(["a dog"], made.params(num_images=0, max_tokens=3), progress=False)
    assert fake.reads == [1, 1, 1]


REAL = torch.zeros(1, dtype=torch.bfloat16)
WAITS = {
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: x * len(x.flatten().tolist()),
    "cpu": lambda x: x.cpu().to(GPU),
    "host tensor": lambda x: x + REAL,
    "made on the host": lambda x: x + torch.zeros(1, dtype=x.dtype).to(GPU),
    "data-dependent shape": lambda x: x + torch.masked_select(x, x > 0).sum(),
    "branch": lambda x: x if x.sum() > 0 else -x,
}


@pytest.mark.parametrize("op", ["silu_mul", "guided_sample"])
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_whatever_makes_the_host_wait_inside_a_step_is_found(fake, monkeypatch, op, wait):
    plain = getattr(cuda, op)
    monkeypatch.setattr(cuda, op, lambda *args: wait(plain(*args)))
    made = fake("7B", None)
    found = "of a step touches|before it is all launched|convert all Tensors|_local_scalar_dense|masked_select"
    with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException), match=found):
        draw(made)
