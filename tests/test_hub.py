"""Where the files of a model are looked for. No test asks a network: the hub's two functions are replaced."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from lumina_rt import CheckpointError, hub


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A hub that has every repository; what was asked of it."""
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    def hf_hub_download(repo, name):
        asked.append((repo, name))
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download)
    return asked


@pytest.fixture
def offline(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("no connection\nand nothing cached")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setattr(hub, "hf_hub_download", fail)


def test_a_folder_is_taken_as_it_is_and_asks_no_hub(offline, tmp_path):
    assert hub.find_model(tmp_path) == tmp_path
    assert hub.find_model(str(tmp_path)) == tmp_path


def test_a_hub_id_is_fetched_without_pickles(online, tmp_path):
    assert hub.find_model("Alpha-VLLM/Lumina-mGPT-7B-768") == tmp_path
    assert online == [("Alpha-VLLM/Lumina-mGPT-7B-768", ["*.json", "*.safetensors"])]


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "a/b/c", "a b/c"])
def test_what_is_neither_a_folder_nor_a_hub_id_asks_no_hub(online, name):
    with pytest.raises(CheckpointError, match="no such folder, and not a hub id") as caught:
        hub.find_model(name)
    assert "\n" not in str(caught.value)
    assert not online


def test_a_hub_that_does_not_answer_is_one_line(offline, tmp_path):
    for ask in (lambda: hub.find_model("owner/name"), lambda: hub.find_tokenizer(tmp_path, None)):
        with pytest.raises(CheckpointError, match="no connection and nothing cached") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_repository_that_does_not_exist_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise RepositoryNotFoundError("404: no repository", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"owner/name: .*the hub did not give it: 404"):
        hub.find_model("owner/name")


def test_the_tokenizer_is_the_arguments_then_the_folders_then_the_familys(online, tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir(), other.mkdir()
    assert hub.find_tokenizer(own, None) == tmp_path / "tokenizer.json"
    assert online == [(hub.TOKENIZER_REPO, "tokenizer.json")]
    (own / "tokenizer.json").touch()
    assert hub.find_tokenizer(own, None) == own / "tokenizer.json"
    assert hub.find_tokenizer(own, other) == other / "tokenizer.json"
    assert hub.find_tokenizer(own, other / "mine.json") == other / "mine.json"
    assert len(online) == 1


def test_the_vqgan_is_the_arguments_then_the_folders_then_the_converted_one(monkeypatch, tmp_path):
    own, converted = tmp_path / "own", tmp_path / "converted"
    own.mkdir(), converted.mkdir()
    monkeypatch.setattr(hub, "VQGAN_FOLDER", converted)
    with pytest.raises(CheckpointError, match=r"lumina-rt convert vqgan.ckpt vqgan.yaml") as caught:
        hub.find_vqgan(own, None)
    assert "\n" not in str(caught.value)
    (converted / "vqgan.safetensors").touch()
    assert hub.find_vqgan(own, None) == converted
    (own / "vqgan.safetensors").touch()
    assert hub.find_vqgan(own, None) == own
    assert hub.find_vqgan(own, "elsewhere").name == "elsewhere"
