"""Build the embedded model from nothing: `python -m lumina_rt.sft.demo FOLDER` (some hours on two cores).

Every part is kept in the folder, so a build that was stopped goes on where it was: the image tokenizer, the text
tokenizer, then for each stage its tokenised dialogs and its training.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
import torch
from huggingface_hub import save_torch_state_dict
from lumina_rt.sft import data, vq
from lumina_rt.sft.model import TrainableModel
from lumina_rt.sft.train import Trainer, TrainingConfig, write_checkpoint
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from lumina_rt import weights
from lumina_rt.tokenizer import Tokenizer
from lumina_rt.vocab import image_name, reserved_name
from lumina_rt.vqgan import VQGAN

MODEL = {
    "model_type": "chameleon",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "model_parallel_size": 1,
    "swin_norm": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
}
TARGET_SIZES = (80, 96, 64)  # the default first
# Among the best of temperatures 0 to 0.6 and scales 1.5 to 3.5, on up to 720 prompts that are not the evaluation's.
SAMPLING = {"temperature": 0.2, "guidance_scale": 2.0}
# Without guidance a cold model adds nothing where it is told to. Of 240 edits 206 were right by this scale, 203 by 1.5.
EDITING = {"guidance_scale": 1.25}
LARGEST_GRID = 12  # units of 16 pixels: 192 is the longest side of the 96 x 96 candidates
N_MERGES = 400

TEXT_TO_IMAGE = {"text_to_image": 17, "describe": 2, "talk": 1}
OMNI = {
    "text_to_image": 12, "describe": 1, "questions": 3, "talk": 0.5, "segmentation": 1.5, "depth": 1, "normals": 1,
    "detection": 2, "editing": 4, "from_condition": 1.5, "multiview": 1.5,
}  # fmt: skip
# Text to image has a larger share again: it is what the model is asked for most.
OMNI_DRAWING = OMNI | {
    "text_to_image": 30, "describe": 1.5, "questions": 4, "detection": 3, "editing": 6, "from_condition": 2,
}  # fmt: skip
# More of what pictures in answer to pictures need, and of questions, in a long stage.
OMNI_LONG = {
    "text_to_image": 24, "describe": 2.5, "questions": 7, "talk": 0.4, "segmentation": 2, "depth": 0.8, "normals": 0.8,
    "detection": 4, "editing": 8, "from_condition": 3, "multiview": 2,
}  # fmt: skip
# And of what was still weak after that.
OMNI_DEEPER = {
    "text_to_image": 30, "describe": 4, "questions": 8, "talk": 0.3, "segmentation": 1.5, "depth": 0.6, "normals": 0.6,
    "detection": 5, "editing": 10, "from_condition": 5, "multiview": 2,
}  # fmt: skip
# Edits and questions before all, of scenes whose things one word hardly tells apart.
OMNI_EDITS = {
    "text_to_image": 33, "describe": 4, "questions": 20, "talk": 0.2, "segmentation": 1, "depth": 0.4, "normals": 0.4,
    "detection": 6, "editing": 30, "from_condition": 4.5, "multiview": 1,
}  # fmt: skip
# And the prompts that this costs.
OMNI_PROMPTS = {"text_to_image": 71, "questions": 15, "editing": 9, "detection": 3, "describe": 2}
# And all that the last two stages showed little of: maps before all.
OMNI_BALANCED = {
    "text_to_image": 40, "describe": 2, "questions": 15, "talk": 0.2, "segmentation": 3, "depth": 2.5, "normals": 3.5,
    "detection": 4, "editing": 26, "from_condition": 2.5, "multiview": 1.3,
}  # fmt: skip
# Boxes, which had lost two points by the balance, twice as often.
OMNI_BOXES = OMNI_BALANCED | {
    "segmentation": 2.5, "depth": 2, "normals": 2.5, "detection": 8, "editing": 25, "multiview": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """tasks: their shares.  targets: areas of the pictures, by their root.  n: dialogs.  passes: over all of them.

    lr, min_lr, muon_lr, quantization: as TrainingConfig.  grows: layers that get a copy behind them first.  also:
    earlier stages whose dialogs are shown again.
    """

    name: str
    tasks: dict[str, float]
    targets: tuple[int, ...]
    n: int
    passes: float
    lr: float
    min_lr: float
    muon_lr: float = 8e-3
    grows: tuple[int, ...] = ()
    also: tuple[str, ...] = ()
    quantization: str = ""


# FP-SFT in three stages of growing area, then Omni-SFT (paper, section 2.2.2), in eight.
STAGES = (
    Stage("fp64", TEXT_TO_IMAGE, (64,), 18_000, 1, 2.5e-3, 2.5e-3),
    Stage("fp80", TEXT_TO_IMAGE, (80,), 60_000, 1, 2.5e-3, 2.5e-3),
    Stage("fp96", TEXT_TO_IMAGE, (96, 80), 3_000, 1, 2.5e-3, 2.5e-3),
    Stage("omni", OMNI, (80, 80, 80, 96, 64), 60_000, 1, 2.5e-3, 2e-5),
    Stage("drawing", OMNI_DRAWING, (80, 80, 80, 96, 64), 120_000, 1, 2.5e-3, 2e-5),
    Stage("long", OMNI_LONG, (80, 80, 80, 96, 64), 240_000, 1.33, 2.5e-3, 2e-5),
    Stage("deeper", OMNI_DEEPER, (80, 80, 80, 96, 64), 200_000, 0.75, 2e-3, 1e-5, 6.5e-3, grows=(2, 4), also=("long",)),
    Stage("edits", OMNI_EDITS, (80, 80, 80, 96, 64), 252_000, 0.87, 1.2e-3, 1e-5, 4e-3, grows=(2, 5)),
    Stage("prompts", OMNI_PROMPTS, (80, 80, 80, 96, 64), 130_000, 0.49, 8e-4, 5e-6, 2.7e-3, also=("edits",)),
    Stage("balanced", OMNI_BALANCED, (80, 80, 80, 96, 64), 190_000, 0.59, 8e-4, 5e-6, 2.7e-3),
    # And in int4 it had lost 2.7 points.
    Stage("boxes", OMNI_BOXES, (80, 80, 80, 96, 64), 140_000, 0.68, 8e-4, 5e-6, 2.7e-3, quantization="int4"),
)
BATCH_TOKENS = 4096


def write_tokenizer(folder: Path, n_codes: int, seed: str = "tokenizer") -> int:
    """Train a byte-level BPE on the words of the tasks, with the published names in front; return its number of ids."""
    turns = data.dialogs_of(OMNI, (96,), 8, 3000, seed)
    words = [message.text for dialog in turns for message in dialog]
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned.train_from_iterator(words, trainers.BpeTrainer(vocab_size=256 + N_MERGES, initial_alphabet=alphabet))
    learned_model = json.loads(learned.to_str())["model"]

    names = ["<s>", "<pad>", "</s>", "<unk>", *map(image_name, range(n_codes)), "<eoss>", "<racm3:break>"]
    names += [reserved_name(n) for n in (8706, 8799, *range(8801, 8801 + LARGEST_GRID))]
    names += sorted(learned_model["vocab"], key=learned_model["vocab"].get)
    merges = [tuple(merge) for merge in learned_model["merges"]]
    file = tokenizers.Tokenizer(models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=merges))
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = decoders.ByteLevel()
    file.add_special_tokens([AddedToken(name, special=True) for name in names[:4]])
    file.save(str(folder / "tokenizer.json"))
    return len(names)


def write_start(folder: Path, vqgan: Path) -> None:
    """Write the checkpoint of random weights that the first stage starts from.

    No Chameleon of this size exists to start from, so image tokens get what it would know of them: those whose codes
    look alike begin alike, as random projections of the codebook.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vqgan.safetensors", "vqgan.json"):
        shutil.copyfile(vqgan / name, folder / name)
    codebook = VQGAN.from_pretrained(folder).quantize.embedding.weight.detach()
    values = MODEL | {"vocab_size": write_tokenizer(folder, len(codebook)), "torch_dtype": "float32"}
    model = TrainableModel(weights.config_from_json(values))
    model.init_weights(seed=0)
    image_tokens = torch.from_numpy(Tokenizer.from_file(folder / "tokenizer.json").vocab.image_tokens)
    latents = (codebook - codebook.mean(0)) / codebook.std(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            likeness = latents @ torch.randn(latents.shape[1], table.shape[1], generator=generator)
            alike = likeness * table.std() / likeness.std()
            table[image_tokens] = 0.9 * alike + 0.4 * table[image_tokens]
    save_torch_state_dict(model.state_dict(), folder)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    generation = {"target_sizes": TARGET_SIZES, "sampling": SAMPLING, "editing": EDITING}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def grow(source: Path, output: Path, behind: Sequence[int]) -> Path:
    """Write the model of `source` with a copy behind each of some layers that adds nothing yet; return `output`.

    It draws as before, and has more to learn with.
    """
    values = weights.read_json(source / "config.json")
    state = weights.read_state(source, weights.config_from_json(values))
    layers = sorted([*range(values["num_hidden_layers"]), *behind])
    grown = {name: weight for name, weight in state.items() if not name.startswith("model.layers.")}
    for new, old in enumerate(layers):
        prefix, is_copy = f"model.layers.{old}.", new > 0 and layers[new - 1] == old
        for name, weight in state.items():
            if name.startswith(prefix):
                ends_block = is_copy and name.endswith(("o_proj.weight", "down_proj.weight"))
                grown[f"model.layers.{new}.{name.removeprefix(prefix)}"] = weight * (not ends_block)
    write_checkpoint(grown, source, output, torch.float32)
    return output


def run_stage(stage: Stage, source: Path, folder: Path) -> Path:
    """Tokenise, then train, whatever of it is not done yet; return the folder of the trained checkpoint."""
    file = folder / "data" / f"{stage.name}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        vqgan = VQGAN.from_pretrained(source)
        tokenizer = Tokenizer.from_file(source / "tokenizer.json")
        dialogs = data.dialogs_of(stage.tasks, stage.targets, vqgan.config.factor, stage.n, stage.name)
        data.write(file, dialogs, stage.n, tokenizer, vqgan)
    if stage.grows:
        source = grow(source, folder / f"{stage.name}-start", stage.grows)
    files, output = [file, *(file.with_stem(name) for name in stage.also)], folder / stage.name
    dtype = weights.fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainingConfig(
        steps=1, batch_tokens=BATCH_TOKENS, lr=stage.lr, min_lr=stage.min_lr, muon_lr=stage.muon_lr, warmup_steps=100,
        clip=1.0, dropout=0.0, dtype=str(dtype).removeprefix("torch."), save_every=500, quantization=stage.quantization,
        compile=stage.n >= 1000,  # it takes 20 s first
    )  # fmt: skip
    trainer = Trainer(source, files, output, config)
    steps = round(len(trainer.batches.epoch(0)) * stage.passes)
    trainer.config = replace(config, steps=steps)
    trainer.run()
    return output


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lumina_rt.sft.demo", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vqgan", type=Path, help="a trained image tokenizer, in place of training one")
    parser.add_argument("--start", type=Path, help="a checkpoint to train on, its image tokenizer with it")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="these alone")
    args = parser.parse_args(argv)
    folder, source = args.folder, args.start or args.folder / "start"
    if not args.start and not (source / "generation_config.json").exists():
        write_start(source, args.vqgan or _train_vqgan(folder / "vqgan"))
    for stage in STAGES:
        if not args.stages or stage.name in args.stages:
            source = run_stage(stage, source, folder)
    print(f"done: {source}")


def _train_vqgan(folder: Path) -> Path:
    if not (folder / "done").exists():
        vq.main([str(folder)])
        (folder / "done").touch()
    return folder


if __name__ == "__main__":
    main()
