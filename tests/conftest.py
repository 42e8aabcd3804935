"""Fixtures that several files share. Random checkpoints stand in for real weights; no test needs a network."""

import dataclasses
import importlib.machinery
import importlib.metadata
import os
import sys
from types import ModuleType

import pytest
import torch
from lumina_rt.kernels import reference

from lumina_rt import Engine, EngineConfig, dummy

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which no code before this does


@pytest.fixture(autouse=True, scope="session")
def _torch_settings():
    # One thread: the tensors are tiny, and threads that wait for each other on a busy machine cost minutes.
    torch.set_num_threads(1)
    # torch then fills new tensors with NaN, so that an element which nothing wrote fails its test.
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True, scope="session")
def _small_pools():
    """Pools of 64 MiB where a test does not say: filled with NaN, each of 4 GiB would take seconds."""
    made = EngineConfig.__init__
    names = (field.name for field in dataclasses.fields(EngineConfig))
    defaults = dict(zip(names, made.__defaults__, strict=True)) | {"kv_cache_gib": 1 / 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "__defaults__", tuple(defaults.values()))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny random checkpoint of the 7B kind whose images have the areas of 64 x 64 and 128 x 128."""
    return dummy.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), generation={"target_sizes": [128, 64]})


@pytest.fixture
def plain_ops(monkeypatch):
    """Engines are made with the reference ops, whose weights are plain tensors that a test can look at and change."""
    monkeypatch.setattr("lumina_rt.backend.cpu", reference)


@pytest.fixture
def engine(checkpoint):
    """A fresh Engine on the tiny checkpoint, with small pages and one draw a step."""
    options = {"page_size": 16, "num_pages": 256, "max_model_len": 1024}
    return Engine.from_pretrained(checkpoint, device="cpu", speculation="off", **options)


@pytest.fixture
def patched_once(monkeypatch):
    """The interpreter patches the language again in each call of a device function: two thirds of its time."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    launch, patch, done = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def launch_once(self, *args, **options):
        done.clear()
        return launch(self, *args, **options)

    def patch_once(fn):
        if id(fn.__globals__) not in done:
            done.add(id(fn.__globals__))
            return patch(fn)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_once)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


@pytest.fixture
def flash(monkeypatch):
    """The op list with flash-attn, which here computes by the reference; `flash.calls` are its tables."""
    calls = []

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        rows, length, _, head_dim = q.shape
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.dtype == k_cache.dtype == v_cache.dtype
        assert k_cache.shape == v_cache.shape
        assert k_cache.shape[1] % 256 == 0
        assert k_cache.shape[3] == head_dim
        assert block_table.dtype == cache_seqlens.dtype == torch.int32
        assert block_table.shape[0] == len(cache_seqlens) == rows
        assert causal
        calls.append(block_table)
        bounds = torch.arange(rows + 1, dtype=torch.int32) * length
        out = reference.paged_attention(q.flatten(0, 1), k_cache, v_cache, block_table, bounds, cache_seqlens)
        return out.view(q.shape)

    module = ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    version = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "2.8.3.post1" if name == "flash_attn" else version(name)
    )
    monkeypatch.delitem(sys.modules, "lumina_rt.kernels.flash_attention", raising=False)
    from lumina_rt.kernels import flash_attention

    flash_attention.calls = calls
    yield flash_attention
    sys.modules.pop("lumina_rt.kernels.flash_attention")
    del sys.modules["lumina_rt.kernels"].flash_attention  # whoever imports it next looks for flash-attn again
