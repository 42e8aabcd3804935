"""The benchmarks run, and end with the JSON object that they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def run(script, *args):
    command = [sys.executable, str(BENCH / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_latency_reports_the_parts_of_an_image_and_the_baseline(checkpoint, tmp_path):
    lines = run(
        "latency.py", "--model", checkpoint, "--size", "64x64", "160x64", "--iters", 1, "--baseline", "reference",
        "--output-json", tmp_path / "a.json", "--plot", tmp_path / "a.png",
    )  # fmt: skip
    report = json.loads(lines[-1])
    assert json.loads((tmp_path / "a.json").read_text()) == report
    assert {"read_gb_s", "int8_gmac_s", "bf16_gflop_s"} == report["floor"].keys()
    assert all(rate > 0 for rate in report["floor"].values())
    assert [result["size"] for result in report["results"]] == ["64x64", "160x64"]
    for result in report["results"]:
        parts = result["prefill_s"] + result["decode_s"] + result["vq_s"]
        assert 0 < parts <= 1.01 * result["s_per_image"]
        assert 0 < result["first_row_s"] < result["s_per_image"]
        assert 0 < result["floor_percent"] < 100
    assert report["baseline"]["n_steps_timed"] == 4 * 5 + 1  # each row with its end, and the end of the image
    assert report["speedup"] == pytest.approx(report["baseline"]["s_per_image"] / report["results"][0]["s_per_image"])
    assert (tmp_path / "a.png").stat().st_size > 0
    compared = run("latency.py", "--compare", tmp_path / "a.json", tmp_path / "a.json")
    assert sum(line.endswith("1.00x") for line in compared) == 8


def test_ops_reports_every_case_that_is_asked_for():
    lines = run("ops.py", "--rows", 1, 2, "--ops", "rms_norm", "guided_sample")
    results = json.loads(lines[-1])["results"]
    assert [(r["op"], r["rows"]) for r in results] == [(op, n) for n in (1, 2) for op in ("rms_norm", "guided_sample")]
    assert all(r["us"] > 0 and 0 < r["floor_percent"] < 100 for r in results)


def test_roofline_computes_the_floor_of_a_step_and_says_that_it_measured_nothing():
    lines = run("roofline.py", "--gpus", "H100", "RTX 4090", "--rows", 1, 2, 128)
    assert "computed, not measured" in lines[0]
    report = json.loads(lines[-1])
    assert report["measured"] is False
    found = {(r["gpu"], r["format"], r["rows"]): r for r in report["results"]}
    assert len(found) == 2 * 3 * 3
    # By hand: 32 layers of four matrices for attention and three for the MLP, and 8192 rows of the head.
    n = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 8192 * 4096
    kv = 1200 * 2**19
    two = found["H100", "bf16", 2]
    assert two["gb"] == pytest.approx((2 * n + 2 * kv) / 1e9, rel=1e-3)
    assert two["gflop"] == pytest.approx(2 * (2 * n + 2 * kv / 2) / 1e9, rel=1e-3)
    assert two["floor_ms"] == pytest.approx(1e3 * two["gb"] / 3350)
    assert two["s_per_image"] == pytest.approx(48 * 48 * two["floor_ms"] / 1e3)
    assert found["H100", "bf16", 1]["s_per_image"] < two["s_per_image"] < found["RTX 4090", "bf16", 2]["s_per_image"]
    assert found["H100", "int8", 2]["gb"] == pytest.approx((n * (1 + 1 / 32) + 2 * kv) / 1e9, rel=1e-3)
    assert found["H100", "int4", 2]["gb"] < found["H100", "int8", 2]["gb"] < two["gb"]
    assert found["RTX 4090", "int4", 128]["s_per_image"] < found["RTX 4090", "int4", 2]["s_per_image"]
    assert two["fits"]
    assert not found["RTX 4090", "int4", 128]["fits"]
    assert (two["bound"], found["RTX 4090", "int4", 128]["bound"]) == ("memory", "memory")


def test_latency_tells_steps_and_draws_held_a_step(checkpoint):
    def result(speculation):
        lines = run("latency.py", "--model", checkpoint, "--size", "64x64", "--iters", 2, "--speculation", speculation)
        report = json.loads(lines[-1])
        assert report["config"]["speculation"] == (int(speculation) if speculation.isdecimal() else speculation)
        return report["results"][0]

    off, wide = result("off"), result("16")
    assert off["acceptance"] == 1
    assert off["n_steps"] == 16  # a code each; the prompt's step draws the first
    assert wide["acceptance"] > 1
    assert wide["n_steps"] < 16


def test_throughput_reports_each_number_in_flight(checkpoint, tmp_path):
    lines = run(
        "throughput.py", "--model", checkpoint, "--size", "64x64", "160x64", "--in-flight", 1, 4, "--images", 8,
        "--page-size", 16, "--speculation", "off", "--output-json", tmp_path / "a.json", "--plot", tmp_path / "a.png",
    )  # fmt: skip
    report = json.loads(lines[-1])
    assert lines[0].startswith("processor ")
    assert json.loads((tmp_path / "a.json").read_text()) == report
    one, four = report["results"]
    assert (one["in_flight"], four["in_flight"]) == (1, 4)
    # Images of 16 and 40 codes, one draw a step; of four the longer ones are the more.
    assert one["n_steps"] == 4 * 16 + 4 * 40
    assert one["n_steps"] / 4 <= four["n_steps"] < one["n_steps"] / 2
    assert four["tokens_per_step"] > 2 * one["tokens_per_step"]
    for result in (one, four):
        assert result["acceptance"] == 1
        assert result["images_per_min"] == pytest.approx(8 * 60_000 / result["ms_per_step"] / result["n_steps"])
        assert 0.5 < result["page_use_reserved"] < result["page_use"] < 1
        assert 0 < result["floor_percent"] < 100
    assert (tmp_path / "a.png").stat().st_size > 0
