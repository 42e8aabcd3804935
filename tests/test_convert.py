"""Conversion of the original VQGAN, from checkpoints and configs made here in the original's form."""

import os
import pickle
from itertools import pairwise

import pytest
import torch
import yaml

from lumina_rt.checkpoint import CheckpointError
from lumina_rt.convert import convert_vqgan
from lumina_rt.vqgan import CONFIG, VQGAN, WEIGHTS, VQGANConfig

TINY = VQGANConfig(embed_dim=6, n_embed=20, z_channels=4, ch=32, ch_mult=(1, 2), num_res_blocks=1)

# Ten lists, each of nine times the one before: some 400 bytes that print as 3 billion words.
ALIASES = "a: &a x\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]" for last, name in pairwise("abcdefghijk")
)


def original_config():
    return {
        "model": {
            "base_learning_rate": 4.5e-06,
            "params": {
                "embed_dim": 6,
                "n_embed": 20,
                "ckpt_path": None,
                "lossconfig": {"target": "losses.VQLPIPSWithDiscriminator", "params": {"disc_start": 250001}},
                "ddconfig": {
                    "double_z": False,
                    "z_channels": 4,
                    "resolution": 512,
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": 32,
                    "ch_mult": [1, 2],
                    "num_res_blocks": 1,
                    "attn_resolutions": [],
                    "dropout": 0.0,
                },
            },
        }
    }


@pytest.fixture
def original(tmp_path):
    """A folder with vqgan.ckpt and vqgan.yaml, and the tensors of the first."""
    torch.manual_seed(0)
    tensors = VQGAN(TINY).state_dict()
    training = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4)}
    checkpoint = {
        "state_dict": {**tensors, **training},
        "epoch": 7,
        "pytorch-lightning_version": "1.0.8",
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}}],
    }
    torch.save(checkpoint, tmp_path / "vqgan.ckpt")
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump(original_config()))
    return tmp_path, tensors


def convert(folder, **options):
    convert_vqgan(folder / "vqgan.ckpt", folder / "vqgan.yaml", folder / "out", **options)


def problems_of(folder):
    """What conversion reports; nothing may have been written."""
    with pytest.raises(CheckpointError) as error:
        convert(folder)
    assert not (folder / "out").exists()
    return error.value.problems


def test_converted_and_loaded_equals_the_original(original):
    folder, tensors = original
    convert(folder)
    assert sorted(path.name for path in (folder / "out").iterdir()) == [CONFIG, WEIGHTS]
    loaded = VQGAN.from_pretrained(folder / "out")
    assert loaded.config == TINY
    assert loaded.state_dict().keys() == tensors.keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_half_precision_and_shared_tensors_are_stored_as_float32(original):
    folder, tensors = original
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    tensors["encoder.norm_out.bias"] = tensors["encoder.norm_out.weight"]
    torch.save({"state_dict": tensors}, folder / "vqgan.ckpt")
    convert(folder)
    loaded = VQGAN.from_pretrained(folder / "out").state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tensors.items())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "legacy", "bare pickle"])
def test_a_malicious_pickle_is_refused_and_does_not_run(original, form):
    folder, tensors = original
    checkpoint = {"state_dict": tensors, "callbacks": Payload(folder / "ran")}
    if form == "bare pickle":
        (folder / "vqgan.ckpt").write_bytes(pickle.dumps({"callbacks": Payload(folder / "ran")}, protocol=2))
    else:
        torch.save(checkpoint, folder / "vqgan.ckpt", _use_new_zipfile_serialization=form == "torch")
    (problem,) = problems_of(folder)
    assert problem.startswith("refused: the pickle asks for ")
    assert "\n" not in problem
    assert not (folder / "ran").exists()


def test_all_wrong_names_are_in_one_report(original):
    folder, tensors = original
    del tensors["encoder.conv_in.bias"], tensors["post_quant_conv.weight"]
    tensors["decoder.up.0.attn.0.norm.weight"] = torch.zeros(32)
    tensors["quant_conv.bias"] = torch.zeros(7)
    torch.save({"state_dict": tensors}, folder / "vqgan.ckpt")
    assert problems_of(folder) == [
        "misshaped: quant_conv.bias is torch.float32 [7]; expected floats [6]",
        "missing: encoder.conv_in.bias",
        "missing: post_quant_conv.weight",
        "unexpected: decoder.up.0.attn.0.norm.weight",
    ]


@pytest.mark.parametrize("content", [{"model": {}}, {"state_dict": None}, [1, 2], torch.zeros(2)])
def test_a_checkpoint_without_a_state_dict_is_refused(original, content):
    folder, _ = original
    torch.save(content, folder / "vqgan.ckpt")
    assert problems_of(folder) == ["no state_dict in it"]


@pytest.mark.parametrize(
    "disguise",
    [
        torch.Tensor.tolist,
        torch.Tensor.to_sparse,
        lambda tensor: tensor.to("meta"),
        lambda tensor: torch.nested.nested_tensor([tensor]),
    ],
    ids=["list", "sparse", "meta", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_entry_that_is_no_dense_tensor_is_refused(original, disguise):
    folder, tensors = original
    tensors["quant_conv.bias"] = disguise(tensors["quant_conv.bias"])
    torch.save({"state_dict": tensors}, folder / "vqgan.ckpt")
    assert problems_of(folder) == ["not a dense tensor: quant_conv.bias"]


@pytest.mark.parametrize("keep", [0, 10, 2000, -30])
def test_a_truncated_checkpoint_is_refused(original, keep):
    folder, _ = original
    whole = (folder / "vqgan.ckpt").read_bytes()
    (folder / "vqgan.ckpt").write_bytes(whole[:keep])
    assert len(problems_of(folder)) == 1


@pytest.mark.parametrize("name", ["vqgan.ckpt", "vqgan.yaml"])
def test_an_absent_file_is_reported_by_its_path(original, name):
    folder, _ = original
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        convert(folder)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.mkdir [ran]", "not YAML"),
        ("", "no model.params"),
        ("model: {params: {embed_dim: 6, n_embed: 20}}", "ddconfig"),
        ("model: {params: {embed_dim: 6, ddconfig: {ch: 32}}}", "n_embed"),
        ("model: {params: {embed_dim: 6, n_embed: 20, ddconfig: {double_z: true}}}", "double_z is True"),
        ("model: {params: {embed_dim: 6, n_embed: 20, ddconfig: {1: 2, z: 3}}}", "['1', 'z'] in"),
        ("model: {params: {embed_dim: 6, n_embed: -20, ddconfig: {}}}", "n_embed is -20"),
        ('model: {params: {embed_dim: 6, n_embed: 20, ddconfig: {"a\\nb": 1}}}', r"a\nb"),
        ("[" * 50_000, "not YAML"),
        ("&a {model: {params: {embed_dim: *a, n_embed: 20, ddconfig: {}}}}", "embed_dim is {"),
        (f"{ALIASES}\nmodel: {{params: {{embed_dim: 6, n_embed: 20, ddconfig: {{ch: *k}}}}}}", "ch is ["),
    ],
)
def test_a_bad_config_is_refused_by_name(original, text, named):
    folder, _ = original
    (folder / "vqgan.yaml").write_text(text)
    (problem,) = problems_of(folder)
    assert named in problem
    assert "\n" not in problem
    assert len(problem) < 250


@pytest.mark.parametrize("present", [WEIGHTS, CONFIG])
def test_nothing_is_overwritten_unless_forced(original, present):
    folder, tensors = original
    (folder / "out").mkdir()
    (folder / "out" / present).write_text("precious")
    with pytest.raises(ValueError, match=f"{present} exists"):
        convert(folder)
    assert (folder / "out" / present).read_text() == "precious"
    assert len(list((folder / "out").iterdir())) == 1
    convert(folder, force=True)
    assert VQGAN.from_pretrained(folder / "out").state_dict().keys() == tensors.keys()


def test_a_forced_conversion_that_fails_leaves_what_was_there(original):
    folder, _ = original
    convert(folder)
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    (folder / "vqgan.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError):
        convert(folder, force=True)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before
