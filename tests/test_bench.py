"""The benchmarks run, and end with the JSON object that they promise. How they time a GPU is held with stand-ins."""

import contextlib
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lumina_rt.kernels import OPS
from torch._subclasses.fake_tensor import FakeTensorMode

from lumina_rt import Engine, backend

BENCH = Path(__file__).parent.parent / "bench"
FAKE_RATES = {"read_gb_s": 2 * 2**30 / 1e6, "int8_gmac_s": 8192**3 / 1e6, "bf16_gflop_s": 2 * 8192**3 / 1e6}
GPU = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)


def module(name):
    """Import a benchmark, which find each other in their folder."""
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))
    return importlib.import_module(name)


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
        "--page-size", 16, "--iters", 2, "--speculation", "off", "--output-json", tmp_path / "a.json",
        "--plot", tmp_path / "a.png",
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


def test_throughput_tells_the_round_of_the_middle_pace():
    rounds = [{"images_per_min": pace, "n_steps": pace + 1} for pace in (9, 1, 5)]
    assert module("throughput").median(rounds) == {"images_per_min": 5, "n_steps": 6}


def test_throughput_leaves_out_what_counting_takes(checkpoint):
    throughput, latency, floor = module("throughput"), module("latency"), module("machine").Floor(1, 1, 1)
    engine = Engine.from_pretrained(checkpoint, device="cpu", speculation="off")
    watch = latency.Watch(engine)
    count = watch._pages
    watch._pages = lambda: time.sleep(0.2) or count()
    args = SimpleNamespace(size=[(64, 64)], guidance_scale=3.0, device="cpu")
    assert throughput.measure(engine, watch, floor, 1, 1, args)["ms_per_step"] < 200


@pytest.mark.parametrize(
    ("script", "option"),
    [("latency", "--iters"), ("latency", "--batch-size"), ("throughput", "--in-flight"), ("ops", "--rows"),
     ("forward", "--cached")],
)  # fmt: skip
@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_less_than_one_of_anything_is_refused_in_a_line(monkeypatch, capsys, script, option, number):
    monkeypatch.setattr(sys, "argv", [script, f"{option}={number}"])
    with pytest.raises(SystemExit):
        module(script).main()
    assert capsys.readouterr().err.endswith(f"argument {option}: {number!r}; expected a whole number from 1 on\n")


@pytest.mark.parametrize("script", ["latency", "throughput", "ops", "forward"])
def test_without_a_gpu_each_ends_with_the_line_of_the_engine(monkeypatch, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no NVIDIA GPU") as told:
        Engine.from_pretrained(device="cuda")
    monkeypatch.setattr(sys, "argv", [script, "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        module(script).main()
    assert ended.value.code == str(told.value)


def test_where_there_is_a_gpu_it_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parser = module("latency").model_parser("")
    assert parser.parse_args([]).device == "cpu"
    assert parser.parse_args(["--device", "cuda"]).device == "cuda"


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_floor_of_a_step_is_of_the_weights_as_either_backend_packs_them(
    checkpoint, monkeypatch, backend, quantization
):
    """By hand: two layers of hidden 64 and intermediate 128 in fp32, a head of 64 codes, 4 heads of 16."""
    if backend == "cuda":
        pytest.importorskip("triton", reason="Triton is not installed; it is on Linux with the extra `test`")
    monkeypatch.setattr("lumina_rt.backend.cpu", importlib.import_module(f"lumina_rt.kernels.{backend}"))
    made = Engine.from_pretrained(checkpoint, device="cpu", quantization=quantization, num_pages=8)
    shapes = 2 * [(192, 64), (64, 64), (256, 64), (64, 128)] + [(64, 64)]
    n_bytes = n_weights = 0
    for i, (outputs, inputs) in enumerate(shapes):
        n_weights += outputs * inputs
        if quantization and backend == "cuda":
            inputs = 512  # zeros up to eight groups, which are read as well
        bits = 32 if quantization is None else 4 if quantization == "int4" and i < 8 else 8
        n_bytes += outputs * inputs * bits / 8 + (outputs * inputs // 64 * 2 if quantization else 0)
    n_bytes += 3 * 100 * 2 * 2 * 64 * 4  # keys and values of two layers, three rows of 100 tokens

    latency, machine = module("latency"), module("machine")

    def seconds(*rates):
        return latency.floor_of_step(made, machine.Floor(*rates), rows=3, n_cached=100, n_tokens=6)

    assert 1e9 * seconds(1, 1e12, 1e12) == pytest.approx(n_bytes)
    # With quantized weights a CPU multiplies whole numbers, a GPU in bf16.
    rate = 5 if quantization and backend == "cpu" else 3 / 2
    assert 1e9 * seconds(1e12, 5, 3) == pytest.approx(6 * n_weights / rate)


@pytest.fixture
def stand_ins(monkeypatch):
    """A GPU that notes what it is told. Its events are 9, 1, 2, 9, 1, 2, ... ms apart."""
    log, machine = [], module("machine")

    class Event:
        n_read = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            assert log[-1] == "synchronize"
            Event.n_read += 1
            return (9, 1, 2)[(Event.n_read - 1) % 3]

    @contextlib.contextmanager
    def recording(graph):
        log.append("begin")
        yield
        log.append("end")

    for name, value in {
        "Event": Event, "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")), "graph": recording,
        "synchronize": lambda: log.append("synchronize"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(machine, "l2_flush", lambda: lambda: log.append("flush"))
    return log


def test_on_a_gpu_a_recorded_op_is_replayed_each_time_behind_a_flush_and_the_median_counts(stand_ins):
    replay = module("machine").recorded(lambda: stand_ins.append("run"))
    assert stand_ins == ["run", "begin", "run", "end"]
    stand_ins.clear()
    assert module("ops").seconds(replay, "cuda") == pytest.approx(0.002)
    assert stand_ins == ["replay", *(["flush", "event", "replay", "event"] * 30), "synchronize"]


@pytest.fixture
def report_of(monkeypatch, capsys, stand_ins):
    """What a benchmark reports of fake CUDA tensors, which have a device, a shape and a dtype and no memory."""
    pytest.importorskip("triton", reason="Triton is not installed; it is on Linux with the extra `test`")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def note(self, *args, grid, **_):
        assert all(x.device.type == "cuda" and x.is_contiguous() for x in args if isinstance(x, torch.Tensor)), self
        stand_ins.append(self.fn.__name__)

    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "run", note)
    # torch's own bindings of two operations need a real GPU, and so does what the reference does.
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: clone(x, memory_format=torch.contiguous_format))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: torch.ops.aten.copy_(self, other))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: GPU)
    monkeypatch.setattr(backend, "flash_refusal", lambda *_: "a test wants ours")

    def report(script, *args):
        monkeypatch.setattr(sys, "argv", [script, "--device", "cuda", *map(str, args)])
        with FakeTensorMode():
            module(script).main()
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["env"]["attention"] == "Triton; a test wants ours"
        assert found["floor"] == pytest.approx(FAKE_RATES)  # of the best run, which took 1 ms
        return found

    return report


def test_every_op_is_timed_on_a_gpu_beside_its_rates(monkeypatch, report_of, stand_ins):
    slow = {name: lambda *_: stand_ins.append("slow") for name in OPS}
    monkeypatch.setattr(module("ops"), "reference", SimpleNamespace(**slow))
    report = report_of("ops", "--rows", 2)
    assert len(report["results"]) == 7 + 5 * 3
    for result in report["results"]:
        assert result["us"] == pytest.approx(2000)
        assert result["memory_percent"] == pytest.approx(100 * result["gb_s"] / FAKE_RATES["read_gb_s"])
        assert result["floor_percent"] >= 0.999 * result["memory_percent"]
    of = {result["case"]: result["gb_s"] * 2e6 for result in report["results"]}
    assert of["o bf16"] == pytest.approx(2 * 4096**2 + 2 * 2 * 2 * 4096)
    assert of["down int4"] == pytest.approx(4096 * 176 * (32 + 2) + 2 * 2 * (11008 + 4096))  # 172 groups, up to 176
    for name in OPS:
        assert f"_{name}_kernel" in stand_ins
    assert stand_ins.count("begin") == stand_ins.count("end") == len(report["results"])
    assert stand_ins.count("replay") == stand_ins.count("slow") == 31 * len(report["results"])


def test_a_forward_pass_is_timed_on_a_gpu_beside_its_floor(report_of, stand_ins):
    report = report_of(
        "forward", "--formats", "bf16", "int4", "--rows", 2, "--layers", 3, "--cached", 300, "--iters", 5
    )
    assert [result["format"] for result in report["results"]] == ["bf16", "int4"]
    of_layer = 4 * 4096**2 + 3 * 4096 * 11008
    head, kept = 65536 * 4096, 2 * 300 * 3 * 2 * 2 * 4096
    for result, n_bytes in zip(
        report["results"],
        (2 * (3 * of_layer + head) + kept, 3 * of_layer * 34 / 64 + 3 * 4096 * 4 * 34 + head * 66 / 64 + kept),
        strict=True,
    ):
        assert result["ms"] == pytest.approx(2)
        assert result["gb_s"] == pytest.approx(n_bytes / 2e6)
        assert result["floor_percent"] == pytest.approx(100 * result["gb_s"] / FAKE_RATES["read_gb_s"])
    assert stand_ins.count("_paged_attention_kernel") == 2 * 3 * 2  # to set up and to record, three layers each


def test_a_forward_pass_is_timed_on_a_cpu_between_floors():
    (one,) = json.loads(run("forward.py", "--formats", "int4", "--rows", 1, "--layers", 1, "--iters", 2)[-1])["results"]
    assert (one["format"], one["rows"]) == ("int4", 1)
    assert one["floor_percent"] == pytest.approx(100 * one["gb_s"] / one["read_gb_s"], rel=0.5)


def test_the_share_of_the_floor_is_of_what_was_measured_around_each_image(checkpoint, monkeypatch):
    latency, machine = module("latency"), module("machine")
    engine = Engine.from_pretrained(checkpoint, device="cpu", speculation="off")
    args = SimpleNamespace(iters=2, batch_size=1, guidance_scale=3.0, device="cpu")

    def least(*rates):
        """Of rates measured before all, after an image to warm up, and after each of two."""
        floors = [machine.Floor(rate, rate, rate) for rate in rates]
        monkeypatch.setattr(machine, "measure_again", lambda *_: floors.pop(0))
        return latency.measure(engine, latency.Watch(engine), floors.pop(0), (64, 64), args)["floor_ms_per_step"]

    assert least(9, 1, 3, 5) == pytest.approx(least(1, 1, 1, 1) * (1 / 2 + 1 / 4) / 2)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_the_peak_of_an_image_leaves_out_what_measuring_takes(checkpoint, monkeypatch):
    latency, machine = module("latency"), module("machine")
    monkeypatch.setattr(machine, "measure_again", lambda floor, _: bytearray(1 << 30) and floor)
    engine = Engine.from_pretrained(checkpoint, device="cpu", speculation="off")
    args = SimpleNamespace(iters=1, batch_size=1, guidance_scale=3.0, device="cpu")
    machine.reset_peak("cpu")
    before = machine.peak_gib("cpu")
    for size in ((64, 64), (160, 64)):
        found = latency.measure(engine, latency.Watch(engine), machine.Floor(1, 1, 1), size, args)
        assert found["peak_gib"] < before + 0.5


def test_the_card_tells_which_gpu_it_was(monkeypatch):
    machine, lines = module("machine"), module("machine")._lines
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: GPU)
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build"
    monkeypatch.setattr(machine, "_lines", lambda path: [version] if "nvidia" in path else lines(path))
    found = machine.environment("cuda")
    assert {"gpu": "NVIDIA H100", "capability": "9.0", "gpu_gib": 80.0, "driver": "570.86.15"}.items() <= found.items()
    assert "gpu" not in machine.environment("cpu")
