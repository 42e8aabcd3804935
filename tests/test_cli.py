"""The command line, in process, on a tiny random checkpoint: what it writes, prints, refuses and returns."""

import argparse
import io
import json
import math
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from test_previews import AtOnce

from lumina_rt import Engine, EngineConfig, SamplingParams, TextDelta, cli, dummy, images
from lumina_rt.vqgan import VQGAN

SMALL = ("--width", "64", "--height", "64")
MACHINE = ("--device", "cpu", "--page-size", "16", "--num-pages", "256", "--max-model-len", "1024", "--quiet")
OTHER_VALUES = {
    "num_images": 2,
    "size": (64, 32),
    "n": 3,
    "seed": 4,
    "max_tokens": 5,
    "guidance_scale": 6.5,
    "temperature": 0.7,
    "top_k": 8,
    "top_p": 0.9,
    "min_p": 0.1,
    "text_temperature": 0.2,
    "text_top_k": 3,
    "text_top_p": 0.4,
    "text_min_p": 0.5,
}


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """Run a command that draws, in an empty folder. Returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, model=checkpoint):
        code = cli.main([*argv, "--model", str(model), *MACHINE])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def plain(tmp_path, monkeypatch, capsys):
    """Run any command, as it is, in an empty folder. Returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def plain(*argv):
        return cli.main(list(argv)), *capsys.readouterr()

    return plain


@pytest.fixture
def picture(tmp_path):
    """A path of a picture of 128 x 128, which is a size of the model."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


@pytest.fixture
def no_model(monkeypatch):
    """Fail the test if a model is loaded."""
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))


def png_names(folder):
    return sorted(path.name for path in folder.iterdir())


def error_line(code, out, err):
    """The one line of an error while running, with nothing on stdout."""
    assert code == 1
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("lumina-rt: error: ")
    return line


def test_generate_writes_the_image_that_the_engine_makes_and_prints_its_name(run, checkpoint, tmp_path):
    code, out, err = run("generate", "a dog", *SMALL, "--seed", "7", "--top-k", "30")
    assert (code, out, err) == (0, "lumina.png\n", "")
    assert png_names(tmp_path) == ["lumina.png"]
    engine = Engine.from_pretrained(checkpoint, device="cpu")
    expected = engine.generate_image("a dog", 64, 64, seed=7, top_k=30).images[0]
    assert np.array_equal(np.asarray(Image.open("lumina.png")), np.asarray(expected))


def test_the_settings_of_an_image_make_it_again(run, checkpoint, tmp_path):
    run("generate", "a dog", *SMALL, "-n", "2", "--guidance-scale", "2.5", "--output", "a.png")
    settings = images.read_settings(tmp_path / "a-1.png")
    assert settings["prompt"] == "a dog"
    assert settings["size"] == [64, 64]
    assert (settings["n"], settings["answer"], settings["guidance_scale"]) == (2, 1, 2.5)
    assert (settings["model"], settings["version"]) == (str(checkpoint), cli.VERSION)
    assert settings["command"] == "generate"
    controls = [f"--{name.replace('_', '-')}={settings[name]}" for name in cli._IMAGE_CONTROLS]
    run("generate", settings["prompt"], *SMALL, "-n", "2", *controls, "--output", "b.png")
    for i in range(2):
        first, second = (np.asarray(Image.open(f"{name}-{i}.png")) for name in "ab")
        assert np.array_equal(first, second)


def test_prompts_come_from_stdin_one_a_line_beside_the_others(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n\n a cow \n"))
    code, out, _ = run("generate", "a dog", "-", *SMALL)
    assert code == 0
    assert out.split() == ["lumina-0.png", "lumina-1.png", "lumina-2.png"]
    prompts = [images.read_settings(tmp_path / name)["prompt"] for name in out.split()]
    assert prompts == ["a dog", "a cat", "a cow"]


def test_several_prompts_with_several_images_each_keep_their_files_apart(run, tmp_path):
    code, out, _ = run("generate", "a dog", "a cat", "-n", "2", *SMALL)
    assert code == 0
    found = [images.read_settings(tmp_path / name) for name in out.split()]
    assert [(s["prompt"], s["answer"]) for s in found] == [("a dog", 0), ("a dog", 1), ("a cat", 0), ("a cat", 1)]


def test_generate_with_a_condition_has_its_size_and_the_controls_of_image_to_image(run, picture, tmp_path):
    code, _, _ = run("generate", "a room", "--condition", picture)
    assert code == 0
    settings = images.read_settings(tmp_path / "lumina.png")
    assert settings["size"] == [128, 128]
    assert (settings["guidance_scale"], settings["top_k"]) == (1.0, 200)
    assert settings["condition"] == picture


def test_edit_makes_what_the_engine_makes(run, checkpoint, picture, tmp_path):
    assert run("edit", picture, "make it red", "--seed", "3", "--top-k", "20")[0] == 0
    expected = Engine.from_pretrained(checkpoint, device="cpu").edit(picture, "make it red", seed=3, top_k=20)
    assert np.array_equal(np.asarray(Image.open("lumina.png")), np.asarray(expected.images[0]))
    settings = images.read_settings(tmp_path / "lumina.png")
    assert (settings["prompt"], settings["image"], settings["guidance_scale"]) == ("make it red", picture, 1.0)


@pytest.mark.parametrize(
    ("task", "method", "words"),
    [
        *[("segmentation", "segment", ()), ("depth", "depth", ()), ("normals", "normals", ()), ("pose", "pose", ())],
        ("detect", "detect", ("cat",)),
    ],
)
def test_label_asks_for_its_task(run, checkpoint, picture, task, method, words):
    code, _, err = run("label", task, picture, "--seed", "3", *[part for word in words for part in ("--object", word)])
    assert (code, err) == (0, "")
    engine = Engine.from_pretrained(checkpoint, device="cpu")
    expected = getattr(engine, method)(picture, *words, seed=3).images[0]
    assert np.array_equal(np.asarray(Image.open("lumina.png")), np.asarray(expected))


@pytest.mark.parametrize("words", [("detect",), ("depth", "--object", "cat")])
def test_an_object_goes_with_detect_and_with_nothing_else(run, no_model, picture, words):
    code, out, err = run("label", words[0], picture, *words[1:])
    assert (code, out) == (2, "")
    assert "--object" in err.splitlines()[-1]


def test_multiview_writes_every_view_and_a_sheet_of_them(run, tmp_path):
    code, out, _ = run("multiview", "a chair", "--views", "3", "--size", "64", "--output", "v.png")
    assert code == 0
    assert out.split() == ["v.png", "v-0.png", "v-1.png", "v-2.png"]
    sheet = np.asarray(Image.open("v.png"))
    assert sheet.shape == (128, 128, 3)
    corners = [sheet[:64, :64], sheet[:64, 64:], sheet[64:, :64]]
    for i, corner in enumerate(corners):
        assert np.array_equal(corner, np.asarray(Image.open(f"v-{i}.png")))
    assert images.read_settings(tmp_path / "v.png")["views"] == 3


def test_chat_streams_the_text_of_one_answer(run, checkpoint, picture):
    options = ("--num-images", "0", "--max-tokens", "12", "--seed", "3")
    code, out, _ = run("chat", "what is it?", "--image", picture, *options)
    assert code == 0
    expected = Engine.from_pretrained(checkpoint, device="cpu").describe(picture, "what is it?", max_tokens=12, seed=3)
    visible = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in expected.text)
    assert out == visible + "\n"


def test_chat_passes_no_escape_sequence_to_the_terminal(capsys):
    cli._print_text(TextDelta(0, 0, "a\x1b[31mb\r\n\tc"))
    assert capsys.readouterr().out == "a\ufffd[31mb\ufffd\n\tc"


def test_chat_keeps_the_dialog_until_quit(run, monkeypatch):
    dialogs = []
    answer = Engine.chat

    def spy(engine, messages, **controls):
        dialogs.append(list(messages))
        return answer(engine, messages, **controls)

    monkeypatch.setattr(Engine, "chat", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/quit\nthree\n"))
    code, _, _ = run("chat", "--num-images", "0", "--max-tokens", "5", "--seed", "3")
    assert code == 0
    assert [[message.role for message in dialog] for dialog in dialogs] == [["user"], ["user", "assistant", "user"]]
    assert [dialogs[1][0].text, dialogs[1][2].text] == ["one", "two"]
    assert len(dialogs[1][1].token_ids) == 5


def test_chat_saves_images_under_names_that_are_free(run, tmp_path):
    (tmp_path / "lumina-0.png").write_text("mine")
    code, out, _ = run("chat", "draw two", "--num-images", "2", "--size", "64x64")
    assert code == 0
    assert out.split() == ["lumina-1.png", "lumina-2.png"]
    assert (tmp_path / "lumina-0.png").read_text() == "mine"
    assert Image.open("lumina-2.png").size == (64, 64)


def test_reconstruct_prints_the_psnr_of_what_it_writes(plain, checkpoint, picture):
    code, out, err = plain("reconstruct", picture, "--vqgan", str(checkpoint), "--target-size", "128", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    before, after = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (picture, "lumina.png"))
    assert report["psnr_db"] == pytest.approx(10 * np.log10(255**2 / np.mean((before - after) ** 2)))
    assert report["size"] == [128, 128]


def test_convert_writes_a_vqgan_that_loads(plain, tmp_path):
    config = dummy.TINY_VQGAN
    torch.save({"state_dict": VQGAN(config).state_dict()}, tmp_path / "vqgan.ckpt")
    names = ("z_channels", "in_channels", "out_ch", "ch", "num_res_blocks", "norm_groups")
    shape = {name: getattr(config, name) for name in names} | {"ch_mult": list(config.ch_mult)}
    values = {"model": {"params": {"ddconfig": shape, "embed_dim": config.embed_dim, "n_embed": config.n_embed}}}
    (tmp_path / "vqgan.yaml").write_text(json.dumps(values))  # JSON is YAML
    command = ("convert", "vqgan.ckpt", "vqgan.yaml", "--output", "converted")
    code, out, _ = plain(*command)
    assert (code, out.split()) == (0, ["converted/vqgan.safetensors", "converted/vqgan.json"])
    assert VQGAN.from_pretrained(tmp_path / "converted").config == config
    assert "exists" in error_line(*plain(*command))
    assert plain(*command, "--force")[0] == 0


def test_info_without_a_model_tells_about_the_machine_alone(plain, no_model):
    code, out, _ = plain("info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["version"] == cli.VERSION
    assert facts["instruction_set"] in ("amx", "avx512", "avx2", "portable")
    assert facts["threads"] == torch.get_num_threads()
    assert facts["attention"].startswith(("C++", "Triton", "flash-attn"))
    assert "model" not in facts


def test_info_tells_the_shape_and_the_memory_of_a_model(plain, checkpoint):
    options = ("--model", str(checkpoint), "--device", "cpu", "--num-pages", "8", "--page-size", "16")
    code, out, err = plain("info", *options, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["shape"]["hidden"], facts["dtype"]) == (64, "float32")
    assert facts["attention"] == "C++, as on every CPU"
    assert facts["kv_bytes_a_token"] == 2 * 2 * 64 * 4
    assert (facts["pool"]["pages"], facts["pool"]["page_size"]) == (8, 16)
    assert "64x64" in facts["sizes"]
    assert plain("info", *options)[1].startswith("version ")


def test_the_demo_says_what_it_knows_and_others_do_not(run, plain):
    code, out, err = plain("generate", "a dog", *MACHINE)
    assert (code, out, err) == (0, "lumina.png\n", cli.DEMO_NOTE + "\n")
    assert run("generate", "a dog", *SMALL, "--force")[2] == ""


@pytest.mark.parametrize(
    ("argv", "files"),
    [
        (("generate", "a dog", *SMALL, "-n", "2"), ["lumina-0.png", "lumina-1.png"]),
        (("multiview", "a chair", "--views", "1", "--size", "64"), ["lumina.png", "lumina-0.png"]),
        (("chat", "hello", "--num-images", "0", "--max-tokens", "5"), []),
        (("chat", "hello", "--num-images", "1", "--size", "64x64"), ["lumina-0.png"]),
    ],
)
def test_json_is_one_object_and_all_that_stands_on_stdout(run, argv, files):
    code, out, err = run(*argv, "--json", "--seed", "5")
    assert (code, err) == (0, "")
    report = json.loads(out)
    (result,) = report["results"]
    assert (report["command"], result["seed"], result["files"]) == (argv[0], 5, files)
    assert result["finish_reason"] in ("stop", "length")
    assert isinstance(result["text"], str)
    assert result["timings"]["n_answer_tokens"] > 0


def test_json_of_several_prompts_has_a_result_for_each(run):
    report = json.loads(run("generate", "a dog", "a cat", *SMALL, "--json")[1])
    assert [(r["prompt"], r["files"]) for r in report["results"]] == [
        ("a dog", ["lumina-0.png"]),
        ("a cat", ["lumina-1.png"]),
    ]


def test_a_summary_stands_on_stderr_unless_quiet(plain, checkpoint):
    machine = [option for option in MACHINE if option != "--quiet"]
    code, out, err = plain("generate", "a dog", *SMALL, "--seed", "5", "--model", str(checkpoint), *machine)
    assert (code, out) == (0, "lumina.png\n")
    assert err.startswith("seed 5, ")


@pytest.mark.parametrize(
    ("argv", "taken"),
    [
        (("generate", "a dog"), "lumina.png"),
        (("generate", "a dog", "-n", "2"), "lumina-1.png"),
        (("edit", "in.png", "make it red"), "lumina.png"),
        (("label", "depth", "in.png"), "lumina.png"),
        (("multiview", "a chair", "--views", "2"), "lumina-1.png"),
        (("multiview", "a chair", "--views", "2"), "lumina.png"),
    ],
)
def test_an_existing_file_is_refused_before_the_model_loads(run, no_model, picture, tmp_path, argv, taken):
    (tmp_path / taken).write_text("mine")
    assert f"{taken} exists already" in error_line(*run(*argv))
    assert (tmp_path / taken).read_text() == "mine"


def test_reconstruct_overwrites_nothing(plain, picture, tmp_path):
    assert "exists already" in error_line(*plain("reconstruct", picture, "--output", picture))


def test_force_replaces_a_file(run, tmp_path):
    (tmp_path / "lumina.png").write_text("mine")
    assert run("generate", "a dog", *SMALL, "--force")[0] == 0
    assert Image.open(tmp_path / "lumina.png").size == (64, 64)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("generate", "a dog", "--output", "nowhere/a.png"), "nowhere is no folder"),
        (("generate", "a dog", "--output", "a.jpg"), "expected a name that ends in .png"),
        (("chat", "hello", "--output", "nowhere/a.png"), "nowhere is no folder"),
        (("generate", "a dog", "--temperature", "-1"), "temperature is -1.0"),
        (("generate", "a dog", "--seed", "-1"), "seed is -1"),
        (("generate", "a dog", "-n", "0"), "n is 0"),
        (("multiview", "a chair", "--top-p", "0"), "top_p is 0.0"),
        (("chat", "hello", "--text-top-p", "nan"), "text_top_p is nan"),
        (("edit", "missing.png", "make it red"), "missing.png is not a file"),
        (("generate", "a room", "--condition", "missing.png"), "missing.png is not a file"),
        (("chat", "hello", "--image", "missing.png"), "missing.png is not a file"),
    ],
)
def test_a_bad_value_is_one_line_before_the_model_loads(run, no_model, tmp_path, argv, words):
    assert words in error_line(*run(*argv))
    assert png_names(tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("generate", " ", *SMALL), "prompt is ' '"),
        (("generate", "a dog", "--width", "100", "--height", "64"), "size 100x64"),
        (("generate", "a dog", "--max-num-seqs", "1"), "max_num_seqs is 1"),
        (("multiview", "a chair", "--size", "999"), "size 999x999"),
    ],
)
def test_what_only_the_model_can_tell_is_one_line_too(run, tmp_path, argv, words):
    assert words in error_line(*run(*argv))
    assert png_names(tmp_path) == []


def test_no_prompt_on_stdin_is_an_error(run, no_model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "no prompt" in error_line(*run("generate", "-"))


def test_a_model_that_is_not_there_is_one_line(run):
    assert "no such folder" in error_line(*run("generate", "a dog", model="not here"))


def test_a_broken_checkpoint_tells_every_problem_on_a_line(run, tmp_path):
    folder = dummy.write_checkpoint(tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text()) | {"hidden_act": "gelu", "vocab_size": 0}
    (folder / "config.json").write_text(json.dumps(config))
    code, out, err = run("generate", "a dog", model=folder)
    assert (code, out) == (1, "")
    title, *problems = err.splitlines()
    assert title.startswith("lumina-rt: error: ")
    assert [problem.split()[0] for problem in problems] == ["hidden_act", "vocab_size"]


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("paint",),
        ("generate",),
        ("generate", "a dog", "--guidance", "seven"),
        ("generate", "a dog", "--paint"),
        ("generate", "a dog", "--dtype", "float8"),
        ("chat", "hello", "--size", "64"),
        ("chat", "hello", "--size", "64x64x64"),
        ("label", "colour", "in.png"),
        ("chat", "--json"),
        ("multiview", "a chair", "--views", "0"),
        ("generate", "a room", "--condition", "in.png", "--width", "64"),
    ],
)
def test_bad_usage_is_2_with_the_reason_last(plain, no_model, argv):
    code, out, err = plain(*argv)
    assert (code, out) == (2, "")
    assert ": error: " in err.splitlines()[-1]


def test_help_and_version_are_0(plain):
    assert plain("--version") == (0, f"lumina-rt {cli.VERSION}\n", "")
    for command in ("generate", "edit", "label", "multiview", "chat", "convert", "reconstruct", "info"):
        code, out, _ = plain(command, "--help")
        assert code == 0
        assert out.startswith(f"usage: lumina-rt {command}")


@pytest.mark.parametrize("argv", [("generate", "a dog", *SMALL), ("chat", "hello"), ("multiview", "a", "--size", "64")])
def test_an_interrupt_is_130_and_leaves_no_file(run, tmp_path, monkeypatch, argv):
    def interrupt(engine):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "_step", interrupt)
    code, out, err = run(*argv)
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert png_names(tmp_path) == []


@pytest.fixture
def at_once(monkeypatch):
    for name in ("previews", "terminal"):
        monkeypatch.setattr(f"lumina_rt.{name}.ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr("lumina_rt.previews.SHARE", math.inf)


def test_a_preview_file_is_written_over_and_over_and_ends_as_the_image(run, at_once, monkeypatch, tmp_path):
    seen, save_png = [], images.save_png

    def spy(image, path, settings=None, force=False):
        save_png(image, path, settings, force)
        seen.append((path.name, np.asarray(image)))

    monkeypatch.setattr(images, "save_png", spy)
    code, out, err = run("generate", "a dog", *SMALL, "--preview-file", "p.png", "--preview-every", "1", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["results"][0]["files"] == ["lumina.png"]
    assert [name for name, _ in seen] == ["p.png"] * 4 + ["lumina.png"]
    gray = [(pixels == 128).all((1, 2)).sum() for _, pixels in seen]  # lines of pixels
    assert gray == [48, 32, 16, 0, 0]
    assert np.array_equal(np.asarray(Image.open("p.png")), np.asarray(Image.open("lumina.png")))
    assert png_names(tmp_path) == ["lumina.png", "p.png"]


def test_the_preview_file_of_several_images_is_a_sheet(run, at_once):
    assert run("multiview", "a chair", "--views", "2", "--size", "64", "--preview-file", "p.png")[0] == 0
    assert np.array_equal(np.asarray(Image.open("p.png")), np.asarray(Image.open("lumina.png")))


@pytest.mark.parametrize(
    ("options", "shown"),
    [((), True), (("--no-preview",), False), (("--json",), False), (("--preview-every", "100"), True)],
)
def test_a_terminal_shows_an_image_as_it_grows(plain, checkpoint, at_once, monkeypatch, options, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("TERM_PROGRAM", raising=False)
    machine = [option for option in MACHINE if option != "--quiet"]
    model = ("--model", str(checkpoint), "--seed", "3")
    code, _, err = plain("generate", "a dog", *SMALL, *model, *machine, "--preview-every", "1", *options)
    assert code == 0
    assert ("\u2580" in err) == shown
    n_pictures = 1 if "100" in options else 4  # three of rows and the whole one
    assert err.count("\x1b[J") == (n_pictures - 1 if shown else 0)  # each but the first replaces one


@pytest.mark.parametrize(("name", "value"), [("TERM", "xterm-kitty"), ("TERM_PROGRAM", "WezTerm"), ("TERM", "xterm")])
def test_a_terminal_of_kittys_protocol_shows_pictures(plain, checkpoint, at_once, monkeypatch, name, value):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("TERM_PROGRAM", raising=False)
    monkeypatch.setenv(name, value)
    machine = [option for option in MACHINE if option != "--quiet"]
    _, _, err = plain("generate", "a dog", *SMALL, "--model", str(checkpoint), *machine)
    assert ("\x1b_Ga=T" in err, "\u2580" in err) == ((False, True) if value == "xterm" else (True, False))


def test_no_terminal_shows_no_preview_and_quiet_neither(plain, run, checkpoint, at_once, monkeypatch):
    machine = [option for option in MACHINE if option != "--quiet"]
    assert "\u2580" not in plain("generate", "a dog", *SMALL, *machine, "--model", str(checkpoint))[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("generate", "a dog", *SMALL, "--force")[2] == ""


def test_a_preview_file_that_cannot_be_written_ends_the_command_in_one_line(run, monkeypatch, tmp_path):
    def fail(image, path, settings=None, force=False):
        raise ValueError(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr(images, "save_png", fail)
    assert "p.png cannot be written" in error_line(*run("generate", "a dog", *SMALL, "--preview-file", "p.png"))
    assert png_names(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--preview-file", "p.jpg"), "'p.jpg'; expected a name that ends in .png"),
        (("--preview-file", "nowhere/p.png"), "nowhere is no folder"),
        (("--preview-file", "in.png"), "in.png exists already"),
        (("--preview-file", "./lumina.png"), "--preview-file is 'lumina.png', which is also the output"),
        (("--preview-every", "0"), "--preview-every is 0; expected a whole number of at least 1"),
    ],
)
def test_bad_options_of_previews_are_one_line_before_the_model_loads(run, no_model, picture, options, words):
    assert words in error_line(*run("generate", "a dog", *options))


@pytest.mark.parametrize("kind", [SamplingParams, EngineConfig])
def test_every_field_is_an_option_with_its_default_and_words_of_its_own(kind):
    parser = argparse.ArgumentParser()
    names = [field.name for field in fields(kind)]
    cli.add_fields(parser, kind, names)
    assert kind(**vars(parser.parse_args([]))) == kind()
    actions = {action.dest: action for action in parser._actions}
    for field in fields(kind):
        words, default = actions[field.name].help.rsplit(" (default: ", 1)
        assert len(words) > 5
        assert default == f"{field.default})"


def test_each_sampling_field_can_be_set_by_a_command_and_reaches_the_request(monkeypatch, run, picture):
    seen = []

    def spy(engine, conversations, params, **_):
        seen.append(params)
        raise ValueError("seen")

    monkeypatch.setattr(Engine, "generate", spy)
    assert OTHER_VALUES.keys() == {field.name for field in fields(SamplingParams)}
    options = {name: f"--{name.replace('_', '-')}={value}" for name, value in OTHER_VALUES.items()}
    options["size"] = "--size=64x32"
    images_too = [options[name] for name in cli._IMAGE_CONTROLS] + ["--num-images-per-prompt=3"]

    run("chat", "hello", *[option for name, option in options.items() if name != "n"])
    run("generate", "a dog", *SMALL, *images_too)
    run("edit", picture, "make it red", *images_too)
    chat, generate, edit = seen
    assert chat == SamplingParams(**OTHER_VALUES | {"n": 1})
    controls = {name: OTHER_VALUES[name] for name in ("n", *cli._IMAGE_CONTROLS)}
    assert generate == SamplingParams(**controls, num_images=1, size=(64, 64))
    assert edit == SamplingParams(**controls, num_images=1, size=(128, 128))


def test_options_that_are_not_given_leave_the_defaults(monkeypatch, run):
    seen = []

    def spy(engine, conversations, params, **_):
        seen.append(params)
        raise ValueError("seen")

    monkeypatch.setattr(Engine, "generate", spy)
    run("chat", "hello")
    run("generate", "a dog", *SMALL)
    assert seen == [SamplingParams(), SamplingParams(num_images=1, size=(64, 64))]


def test_the_engine_options_reach_the_engine(monkeypatch, plain):
    seen = {}

    def spy(model, **options):
        seen.update(options, model=model)
        raise ValueError("seen")

    monkeypatch.setattr(Engine, "from_pretrained", spy)
    values = {"page_size": 32, "num_pages": 9, "kv_cache_gib": 1.5, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    values |= {"max_model_len": 128, "tokenizer": "t", "vqgan": "v", "dtype": "float32", "device": "cpu", "model": "m"}
    values |= {"quantization": "int4", "kv_cache_dtype": "int8", "speculation": 8, "attn_backend": "triton"}
    values |= {"gpu_memory_utilization": 0.5}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    plain("generate", "a dog", *options, "--enforce-eager")
    assert seen == values | {"enforce_eager": True}
