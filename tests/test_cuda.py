"""The Engine's way on CUDA, held without a GPU: its ops in Triton's interpreter draw what the reference draws."""

import numpy as np
import pytest
from lumina_rt.kernels import cpu, reference

from lumina_rt import Engine, ImageRow, engine, prompts

pytest.importorskip("triton", reason="Triton is not installed; it is on Linux with the extra `test`")
from lumina_rt.kernels import cuda


def test_the_engine_takes_triton_on_cuda_and_cpp_on_a_cpu():
    assert engine._ops("cuda") is cuda
    assert engine._ops("cpu") is cpu


def first_row(ops, monkeypatch):
    """The first row of codes of a picture of the embedded model, made by some ops, and no more of it."""
    monkeypatch.setattr(engine, "cpu", ops)
    shipped = Engine.from_pretrained("demo", device="cpu", speculation="off", page_size=16, num_pages=64)
    params = shipped.params(num_images=1, size=(64, 64), seed=3, temperature=4.0)
    with shipped.stream(prompts.text_to_image("a red circle left of a blue star", 64, 64), params) as events:
        return next(event.codes for event in events if isinstance(event, ImageRow))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy tells of what the kernels mask away
@pytest.mark.usefixtures("patched_once")
def test_the_embedded_model_draws_the_same_with_triton_as_with_the_reference(monkeypatch):
    """One row of eight: the interpreter takes half a second a token."""
    expected = first_row(reference, monkeypatch)
    assert len(set(expected.tolist())) > 4, expected  # so that a wrong draw would be seen
    assert np.array_equal(first_row(cuda, monkeypatch), expected)
