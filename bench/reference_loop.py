"""The decoding loop of the released code over transformers' Chameleon: what `latency.py` compares with.

Two forwards of batch 1 a token, each with a growing cache of its own; guidance, the constraint on image tokens and
top-k over the whole vocabulary in fp32, also where the token is forced; a softmax and a multinomial draw.
"""

import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, DynamicCache
from transformers.utils import logging

from lumina_rt import weights
from lumina_rt.tokenizer import Tokenizer
from lumina_rt.vocab import Vocab


def load(folder: Path, device: str) -> tuple[ChameleonForConditionalGeneration, Vocab]:
    """A checkpoint folder as transformers' model on a device, in the checkpoint's dtype, and its vocabulary."""
    logging.set_verbosity_error()
    values = weights.read_json(folder / "config.json")
    shape, vocab = weights.stored_config(folder), Tokenizer.from_file(folder / "tokenizer.json").vocab
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    for name, tensor in tensors.items():
        if ".q_norm." in name or ".k_norm." in name:
            heads = shape.heads if ".q_norm." in name else shape.kv_heads
            tensors[name] = tensor.repeat_interleave(heads // len(tensor), dim=0)
    config = ChameleonConfig(
        **{key: value for key, value in values.items() if key not in ("torch_dtype", "model_type")},
        vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 8},
        vocabulary_map={"<image>": 5, "IMGIMGAZ": 4},
    )
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(config)
    model.model.vqmodel = None  # not asked here
    model.load_state_dict(tensors, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval().to(device), vocab


class Stream:
    """One sequence, with its cache."""

    def __init__(self, model: ChameleonForConditionalGeneration, tokens: list[int]):
        self.model, self.cache, self.fed = model, DynamicCache(), 0
        self.tokens, self.device = list(tokens), model.device

    def logits(self) -> torch.Tensor:
        """Feed what was not fed yet; return the last logits, fp32 [1, vocab]."""
        new = torch.tensor([self.tokens[self.fed :]], device=self.device)
        places = torch.arange(self.fed, len(self.tokens), device=self.device)[None]
        self.fed = len(self.tokens)
        hidden = self.model.model(input_ids=new, past_key_values=self.cache, use_cache=True, position_ids=places)[0]
        return self.model.lm_head(hidden[:, -1]).float()


@torch.inference_mode()
def decode(model, vocab: Vocab, prompt: list[int], size: tuple[int, int], scale: float, top_k: int, steps: int):
    """Decode `steps` tokens of an image of `size`, latents wide and high; all of them where there are fewer.

    Returns (tokens, seconds of each step); the first step prefills both streams.
    """
    width, height = size
    start = [vocab.image_start, vocab.grid_token(height // 2), vocab.grid_token(width // 2)]
    cond, uncond = Stream(model, prompt + start), Stream(model, start)
    streams = [cond, uncond] if scale != 1 else [cond]
    image_ids = torch.from_numpy(vocab.image_ids).to(model.device)
    times: list[float] = []
    for n in range(min(steps, height * (width + 1) + 1)):
        began = time.perf_counter()
        scores = cond.logits()
        if scale != 1:
            base = uncond.logits()
            scores = scale * (scores - base) + base
        allowed = torch.full_like(scores, float("-inf"))
        if n == height * (width + 1):
            allowed[:, vocab.image_end] = 0
        elif (n + 1) % (width + 1) == 0:
            allowed[:, vocab.end_of_line] = 0
        else:
            allowed[:, image_ids] = scores[:, image_ids]
        scores = allowed
        kth = torch.topk(scores, min(top_k, scores.shape[-1]))[0][..., -1, None]
        scores = scores.masked_fill(scores < kth, float("-inf"))
        token = int(torch.multinomial(scores.softmax(-1), 1))
        for stream in streams:
            stream.tokens.append(token)
        times.append(time.perf_counter() - began)
    return cond.tokens[len(prompt) :], times
