"""The trainer of FP-SFT and Omni-SFT (paper, section 2.2; facts of the original's in the code below).

One process on a CPU or a GPU, or under torchrun with FSDP2. Every step is a function of the seed and its number, so
a run that was killed goes on as if it had not been.
"""

import json
import math
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from lumina_rt.kernels.quantization import BITS, GROUP, dequantize, quantize
from lumina_rt.sft.data import Batches, Dialogs, collate
from lumina_rt.sft.model import TrainableModel, loss_of
from lumina_rt.sft.muon import Muon
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from lumina_rt import weights
from lumina_rt.tokenizer import Tokenizer

LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainingConfig:
    """The defaults are the paper's where it tells them; a small model wants a larger `lr`.

    batch_tokens: of one forward, padding included.  accumulate: forwards a step, on each process.
    lr, min_lr: after `warmup_steps` of linear growth, half a cosine from the one to the other.
    muon_lr: where AdamW learns by `lr`, Muon learns by this the matrices inside layers; 0 leaves them to AdamW.
    clip: largest norm of the gradient.  context_drop: how often the words before an image are left out.
    recompute: keep no activations inside layers.  save_every: steps between saved states.
    quantization: in "int8" or "int4" every other step computes with the matrices as an Engine would load them in that
    format, and learns the matrices themselves (straight-through), so that less is lost when they are loaded so.
    compile: fuse what stands between the products of a layer (torch.compile; some 20 s at the start, a C++ compiler on
    a CPU; the embedded model then learns 16,400 tokens a second on two AVX-512 cores in place of 12,500).
    """

    steps: int
    batch_tokens: int = 4096
    accumulate: int = 1
    lr: float = 2e-5
    min_lr: float = 2e-5
    muon_lr: float = 0.0
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip: float = 4.0
    z_loss: float = 1e-5
    dropout: float = 0.05
    context_drop: float = 0.1
    dtype: str = "bfloat16"
    quantization: str = ""
    recompute: bool = False
    compile: bool = False
    save_every: int = 500
    seed: int = 0

    def __post_init__(self):
        if self.dtype not in weights.DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(weights.DTYPES)}")
        if self.quantization and self.quantization not in BITS:
            raise ValueError(f"quantization is {self.quantization!r}; expected {', '.join(BITS)} or nothing")
        for name in ("steps", "batch_tokens", "accumulate", "lr", "clip", "save_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")


def autocast(device: str, dtype: torch.dtype):
    """Autocast to `dtype`, which for fp32 is nothing at all."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


class Trainer:
    """A model, its optimizer and the files of a run."""

    def __init__(self, model_folder: Path, data: list[Path], output: Path, config: TrainingConfig):
        """model_folder: a checkpoint to start from; one without weights starts from random ones.

        Raises CheckpointError or ValueError for what cannot be trained.
        """
        self.config, self.source, self.output = config, model_folder, output
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if config.muon_lr and self.world > 1:
            raise ValueError(f"muon_lr is {config.muon_lr}; expected 0 with several processes, which cut matrices up")
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        dialogs = Dialogs(data)
        self.batches = Batches(dialogs, config.batch_tokens, config.seed)
        self.image_start = Tokenizer.from_file(model_folder / "tokenizer.json").vocab.image_start
        self.model = self._build(dialogs.largest)
        self.optimizers = self._optimizers()
        self.step = 0

    def _build(self, largest_token: int) -> TrainableModel:
        c = self.config
        shape = weights.stored_config(self.source)
        if largest_token >= shape.vocab_size:
            raise ValueError(f"the data holds token {largest_token}; the model has {shape.vocab_size} tokens")
        for width in (shape.hidden, shape.intermediate):
            if c.quantization and width % GROUP:
                raise ValueError(f"the model is {width} wide; quantization expects a multiple of {GROUP}")
        model = TrainableModel(shape, c.dropout, c.recompute)
        if c.compile:
            for layer in model.model.layers:
                layer.compile(dynamic=True)
        if weights.has_weights(self.source):
            if self.rank == 0:
                model.load_state_dict(weights.read_state(self.source, shape))
        else:
            model.init_weights(c.seed)
        if self.world == 1:
            return model.to(self.device)
        # bf16 weights and activations, fp32 masters and reductions, as the original trains.
        policy = MixedPrecisionPolicy(param_dtype=weights.DTYPES[c.dtype], reduce_dtype=torch.float32)
        full = model.state_dict()
        for part in (*model.model.layers, model):
            fully_shard(part, mp_policy=policy)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, full if self.rank == 0 else {}, options=options)
        return model.to(self.device)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        named = self.model.named_parameters()
        matrices = {name: p for name, p in named if c.muon_lr and name.endswith("proj.weight")}
        others = [p for name, p in self.model.named_parameters() if name not in matrices]
        optimizers = [torch.optim.AdamW(others, lr=c.lr, betas=(0.9, 0.95), weight_decay=c.weight_decay)]
        if matrices:
            optimizers.append(Muon(matrices.values(), c.muon_lr, weight_decay=c.weight_decay))
        return optimizers

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        c = self.config
        if step < c.warmup_steps:
            return c.lr * (step + 1) / c.warmup_steps
        done = (step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        return c.min_lr + (c.lr - c.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def run(self) -> None:
        """Train up to config.steps, from the last saved state if there is one, and write the checkpoint.

        Raises FloatingPointError when the loss is not finite; the last saved state stays. Raises as `resume`.
        """
        c = self.config
        self.output.mkdir(parents=True, exist_ok=True)
        self.resume()
        bar = tqdm(total=c.steps, initial=self.step, unit="step", mininterval=5, disable=self.rank > 0)
        with bar, self._log() as log:
            for group in self.batches.groups(c.accumulate * self.world, self.step):
                if self.step >= c.steps:
                    break
                record = self.train_step(group)
                if log:
                    log.write(json.dumps(record) + "\n")
                bar.update()
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
                if self.step % c.save_every == 0 or self.step == c.steps:
                    if log:
                        log.flush()
                        draw_loss(self.output)
                    self.save()

    def train_step(self, group: list[list[int]]) -> dict:
        """One step of the optimizer over a group of batches, this process's share of it here."""
        c = self.config
        for optimizer in self.optimizers:
            for options in optimizer.param_groups:
                options["lr"] = optimizer.defaults["lr"] * self.lr(self.step) / c.lr
        mine = [
            collate(self.batches.dialogs, batch, self.image_start, c.context_drop, hash((c.seed, self.step, i)))
            for i, batch in enumerate(group)
            if i % self.world == self.rank
        ]
        # Every learned token of the step weighs the same, however the step is cut into batches and processes.
        n_learned = self._sum(torch.tensor(float(sum((labels[:, 1:] >= 0).sum() for _, labels in mine))))
        torch.manual_seed(hash((c.seed, self.step, self.rank)))
        total = torch.zeros((), device=self.device)
        with self._rounded() if c.quantization and self.step % 2 else nullcontext():
            for tokens, labels in mine:
                with self._autocast():
                    loss, _ = loss_of(self.model, tokens.to(self.device), labels.to(self.device), c.z_loss)
                (loss * (self.world / n_learned)).backward()  # FSDP takes the mean over processes
                total += loss.detach()
        loss = float(self._sum(total) / n_learned)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.step} is {loss}; the state of the last save is kept")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        if not math.isfinite(norm := float(norm)):
            raise FloatingPointError(f"the gradient of step {self.step} is {norm}; the state of the last save is kept")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        record = {"step": self.step, "loss": loss, "grad_norm": norm, "lr": self.lr(self.step)}
        self.step += 1
        return record | {"tokens": int(n_learned)}

    @contextmanager
    def _rounded(self):
        """The matrices as they would load quantized, and afterwards as they were."""
        named = [(name, p.detach()) for name, p in self.model.named_parameters() if weights.is_matrix(name)]
        # FSDP cuts outputs up, and an output is rounded by itself.
        matrices = [(name, p.to_local() if self.world > 1 else p) for name, p in named]
        kept = [matrix.clone() for _, matrix in matrices]
        try:
            for name, matrix in matrices:
                stored = matrix.to(weights.DTYPES[self.config.dtype])
                matrix.copy_(dequantize(quantize(stored, weights.bits_of(name, self.config.quantization))))
            yield
        finally:
            for (_, matrix), before in zip(matrices, kept, strict=True):
                matrix.copy_(before)

    def _autocast(self):
        dtype = weights.DTYPES[self.config.dtype]
        return nullcontext() if self.world > 1 else autocast(self.device.type, dtype)

    def _sum(self, value: Tensor) -> Tensor:
        if self.world > 1:
            value = value.to(self.device)
            dist.all_reduce(value)
        return value

    def save(self) -> None:
        """Save the checkpoint, then the state of training that made it; each whole or not at all."""
        full = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.rank == 0:
            write_checkpoint(full, self.source, self.output, weights.DTYPES[self.config.dtype])
        model, optimizer = get_state_dict(self.model, self.optimizers)
        partial, previous, state = (self.output / name for name in ("state.partial", "state.previous", "state"))
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        values = {"model": model, "optimizer": optimizer, "step": self.step, "data": self._data()}
        dcp.save(values, checkpoint_id=partial, no_dist=self.world == 1)
        if self.rank == 0:
            if state.exists():
                shutil.rmtree(previous, ignore_errors=True)
                state.rename(previous)
            partial.rename(state)
            shutil.rmtree(previous, ignore_errors=True)

    def _data(self) -> str:
        lengths = self.batches.dialogs.lengths
        return f"{len(lengths)} dialogs of {lengths.sum()} tokens"

    def resume(self) -> None:
        """Go back to the last saved state, if there is one. Raises ValueError where it is of a run over other data."""
        # Killed while it replaced the state, a run has left the one before.
        places = (self.output / name for name in ("state", "state.previous"))
        state = next((place for place in places if place.exists()), None)
        if state is None:
            return
        model, optimizer = get_state_dict(self.model, self.optimizers)
        values = {"model": model, "optimizer": optimizer, "step": 0, "data": ""}
        dcp.load(values, checkpoint_id=state, no_dist=self.world == 1)
        if values["data"] != self._data():
            raise ValueError(
                f"{self.output} holds a run over {values['data']}, not over {self._data()}; name another folder"
            )
        set_state_dict(
            self.model, self.optimizers, model_state_dict=values["model"], optim_state_dict=values["optimizer"]
        )
        self.step = values["step"]

    def _log(self):
        if self.rank:
            return nullcontext()
        path = self.output / LOG
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] < self.step]
        path.write_text("".join(f"{line}\n" for line in kept))
        return path.open("a")


def draw_loss(folder: Path) -> None:
    """Draw the loss of each step of a run, and its running mean, as loss.png in the run's folder."""
    records = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(8, 4))
    axis = figure.subplots()
    axis.plot(steps, losses, linewidth=0.5, alpha=0.4)
    axis.plot(steps[window - 1 :], smooth)
    axis.set_xlabel("step")
    axis.set_ylabel("loss of a learned token")
    axis.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=100, bbox_inches="tight")


def write_checkpoint(state: dict[str, Tensor], source: Path, output: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint in the published layout: weights anew, all else but their number of layers as in `source`."""
    partial = output / "checkpoint.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # Copies, as what FSDP gathers are views into larger tensors, which safetensors refuses.
    save_torch_state_dict({name: value.to(dtype, copy=True).contiguous() for name, value in state.items()}, partial)
    for name in ("tokenizer.json", "generation_config.json", "vqgan.json", "vqgan.safetensors"):
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    values = weights.read_json(source / "config.json") | {"torch_dtype": str(dtype).removeprefix("torch.")}
    values.pop("dtype", None)  # its other name
    values["num_hidden_layers"] = sum(name.endswith("self_attn.q_proj.weight") for name in state)
    (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for file in partial.iterdir():
        file.replace(output / file.name)
    partial.rmdir()
