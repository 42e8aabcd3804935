"""Where the files of a model are: in a folder, on the hub, or where `lumina-rt convert` puts them."""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lumina_rt.checkpoint import CheckpointError

# The embedded model, made by `python -m lumina_rt.sft.demo`.
DEMO_FOLDER = Path(__file__).parent / "demo"
# Only this repository of the family ships the tokenizer; it serves all of them.
TOKENIZER_REPO = "Alpha-VLLM/Lumina-mGPT-7B-768"
# `lumina-rt convert` writes here unless told otherwise, so that one conversion serves every checkpoint.
VQGAN_FOLDER = Path.home() / ".cache" / "lumina_rt"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)


def find_model(model: str | Path) -> Path:
    """The folder of a model: "demo", an existing folder, or a hub id, which is fetched.

    Raises CheckpointError when there is none.
    """
    if str(model) == "demo":
        return DEMO_FOLDER
    if Path(model).is_dir():
        return Path(model)
    if not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(model, ["no such folder, and not a hub id of the form owner/name"])
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors"]))
    except _HUB_ERRORS as error:
        raise CheckpointError(model, [f"no such folder, and the hub did not give it: {_one_line(error)}"]) from error


def find_tokenizer(folder: Path, tokenizer: str | Path | None) -> Path:
    """The tokenizer.json to use: the argument's (a file or a folder), the model folder's, or the family's."""
    if tokenizer is not None:
        path = Path(tokenizer)
        return path / "tokenizer.json" if path.is_dir() else path
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    try:
        return Path(hf_hub_download(TOKENIZER_REPO, "tokenizer.json"))
    except _HUB_ERRORS as error:
        problem = f"tokenizer.json is missing (pass tokenizer=...), and {TOKENIZER_REPO} did not give it: "
        raise CheckpointError(folder, [problem + _one_line(error)]) from error


def find_vqgan(folder: Path, vqgan: str | Path | None) -> Path:
    """Where vqgan.safetensors is: the argument, the model folder, or where `convert` put it."""
    if vqgan is not None:
        return Path(vqgan)
    for place in (folder, VQGAN_FOLDER):
        if (place / "vqgan.safetensors").is_file():
            return place
    problem = "vqgan.safetensors is missing: make it once with `lumina-rt convert vqgan.ckpt vqgan.yaml`, "
    raise CheckpointError(folder, [problem + "from original_tokenizers/ of Alpha-VLLM/Chameleon_7B_mGPT"])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
