"""A bad setting is one line that names the field, the value and what was expected; nothing bad gets further."""

import dataclasses
import math

import pytest

from lumina_rt.params import EngineConfig, SamplingParams

NOT_WHOLE = [-1, 1.0, 1.5, "1", True, math.nan, [1]]
NOT_REAL = [-0.001, 100.5, 10**400, -math.inf, math.inf, math.nan, "1", True, None, 1j]
NOT_SIZES = [768, "ab", (768,), (1, 2, 3), (768, 0), (768, -32), (768.0, 768), (True, 64), ("768", "768"), {1, 2}]

BAD_SAMPLING = [
    *[("num_images", value) for value in NOT_WHOLE],
    *[("n", value) for value in (0, None, *NOT_WHOLE)],
    *[("seed", value) for value in (2**63, *NOT_WHOLE)],
    *[("max_tokens", value) for value in (0, None, *NOT_WHOLE)],
    *[("size", value) for value in NOT_SIZES],
    *[("guidance_scale", value) for value in NOT_REAL],
    *[(prefix + "temperature", value) for prefix in ("", "text_") for value in NOT_REAL],
    *[(prefix + "top_k", value) for prefix in ("", "text_") for value in (None, 2**63, *NOT_WHOLE)],
    *[(prefix + "top_p", value) for prefix in ("", "text_") for value in (0, 0.0, 1.001, *NOT_REAL)],
    *[(prefix + "min_p", value) for prefix in ("", "text_") for value in (1.001, *NOT_REAL)],
]
BAD_CONFIG = [
    *[("page_size", value) for value in (0, 4, 24, 255, *NOT_WHOLE)],
    *[("num_pages", value) for value in (0, *NOT_WHOLE)],
    *[("kv_cache_gib", value) for value in (0, -1, math.nan, math.inf, 10**400, "4", True, None)],
    *[("max_num_seqs", value) for value in (0, 1, None, *NOT_WHOLE)],
    *[("max_num_batched_tokens", value) for value in (15, None, *NOT_WHOLE)],
    *[("max_model_len", value) for value in (15, None, *NOT_WHOLE)],
    *[("gpu_memory_utilization", value) for value in (0, 1.1, *NOT_REAL)],
    *[("enforce_eager", value) for value in (0, 1, None, "yes")],
    *[("attn_backend", value) for value in ("Flash", "sdpa", "", None, 1, ["flash"])],
]


def check_refusal(kind, field, value):
    with pytest.raises(ValueError, match=f"^{field} is ") as caught:
        kind(**{field: value})
    report = str(caught.value)
    assert report.startswith(f"{field} is {value!r}; expected ")
    assert "\n" not in report


@pytest.mark.parametrize(("field", "value"), BAD_SAMPLING, ids=lambda x: str(x)[:12])
def test_a_bad_sampling_value_is_refused_with_its_name_and_what_was_expected(field, value):
    check_refusal(SamplingParams, field, value)


@pytest.mark.parametrize(("field", "value"), BAD_CONFIG, ids=lambda x: str(x)[:12])
def test_a_bad_engine_value_is_refused_with_its_name_and_what_was_expected(field, value):
    check_refusal(EngineConfig, field, value)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_images", [None, 0, 1, 16]),
        ("size", [None, (32, 2048)]),
        ("n", [1, 64]),
        ("seed", [None, 0, 2**63 - 1]),
        ("max_tokens", [1, 10**9]),
        ("guidance_scale", [0, 1, 1.0, 100]),
        ("temperature", [0, 0.0, 0.7, 100]),
        ("text_temperature", [0, 100]),
        ("top_k", [0, 1, 8192]),
        ("text_top_k", [0, 65536]),
        ("top_p", [1e-9, 1]),
        ("text_top_p", [0.5, 1.0]),
        ("min_p", [0, 1]),
        ("text_min_p", [0.0, 1.0]),
    ],
)
def test_every_bound_is_itself_allowed(field, values):
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


def test_every_bound_of_the_engine_is_itself_allowed():
    smallest = EngineConfig(8, 1, 1e-3, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=16)
    assert smallest.page_size == 8
    assert EngineConfig(page_size=1024).page_size == 1024


def test_the_device_decides_the_page_size_where_nobody_else_does():
    assert {device: EngineConfig().on(device).page_size for device in ("cpu", "cuda")} == {"cpu": 16, "cuda": 256}
    assert EngineConfig(page_size=64, max_num_seqs=4).on("cpu") == EngineConfig(page_size=64, max_num_seqs=4)


def test_defaults_are_those_of_the_reference():
    # Temperature 1, image top-k 2000, text top-k 10, guidance 4.0 (README), 8192 tokens; neither top-p nor min-p.
    assert dataclasses.asdict(SamplingParams()) == {
        "num_images": None,
        "size": None,
        "n": 1,
        "seed": None,
        "max_tokens": 8192,
        "guidance_scale": 4.0,
        "temperature": 1.0,
        "top_k": 2000,
        "top_p": 1.0,
        "min_p": 0.0,
        "text_temperature": 1.0,
        "text_top_k": 10,
        "text_top_p": 1.0,
        "text_min_p": 0.0,
    }


def test_sixteen_views_of_384_and_their_prompt_fit_into_the_default_length():
    assert EngineConfig().max_model_len >= 16 * 604 + 1 + 300


def test_a_size_given_as_a_list_is_kept_as_a_tuple():
    assert SamplingParams(size=[512, 256]).size == (512, 256)


def test_settings_cannot_be_changed_behind_the_check():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = -1
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().page_size = 3
