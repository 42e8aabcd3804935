"""Status-aware decoding (paper, appendix E): which head and which controls hold for each draw of a step.

Inside an image the head is computed on its codes alone, guided and under the image controls; at an open size token
on the legal sizes; in text on everything, under the text controls, less what text may not hold. The draw itself is
an op; nothing here keeps state between steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lumina_rt.kernels import Controls, NoiseKeys
from lumina_rt.model import Model, upload
from lumina_rt.request import Draw, Sample
from lumina_rt.vocab import Vocab


@dataclass
class Pick:
    """One draw to make: the token `index` of a sample.

    cond, uncond: lines of the step's hidden states; equal where there is no guidance.
    """

    sample: Sample
    seed: int
    index: int
    cond: int
    uncond: int


class Sampler:
    def __init__(self, model: Model, vocab: Vocab):
        self.model, self.vocab = model, vocab
        self.device = model.embed.device
        self.image_tokens = upload(vocab.image_tokens.tolist(), torch.int64, self.device)
        self.all_tokens = torch.arange(model.config.vocab_size, device=self.device)
        # Rows of the head beyond the tokenizer's names, padding, are no text either.
        unnamed = np.arange(vocab.size, model.config.vocab_size)
        not_text = np.concatenate((vocab.text_forbidden, unnamed))
        self.not_text = upload(not_text.tolist(), torch.int64, self.device)

    @torch.inference_mode()
    def draw(self, picks: Sequence[Pick], hidden: Tensor) -> list[int]:
        """Draw one token for each pick.

        hidden: [n, hidden], the output of Model.forward.  Returns tokens in the order of `picks`. Raises
        FloatingPointError when logits are not finite.
        """
        if not picks:
            return []
        codes = [pick for pick in picks if pick.sample.next_draw is Draw.CODE]
        text = [pick for pick in picks if pick.sample.next_draw is Draw.TEXT]
        groups = [(codes, self._code_logits), (text, self._text_logits)]
        groups += [([pick], self._size_logits) for pick in picks if pick.sample.next_draw in (Draw.HEIGHT, Draw.WIDTH)]
        groups = [(group, head) for group, head in groups if group]
        # All draws are launched before one of them is read.
        tokens = read(torch.cat([self._draw_group(group, head, hidden) for group, head in groups]))
        drawn = dict(zip((id(pick) for group, _ in groups for pick in group), tokens, strict=True))
        return [drawn[id(pick)] for pick in picks]

    @torch.inference_mode()
    def draw_codes(self, picks: Sequence[Pick], hidden: Tensor) -> Tensor:
        """As `draw` for codes of images alone, which stay on the device: int64 [picks], unread and unchecked."""
        return self._draw_group(picks, self._code_logits, hidden)

    def _draw_group(self, group: list[Pick], head, hidden: Tensor) -> Tensor:
        lines = sorted({line for pick in group for line in (pick.cond, pick.uncond)})
        at = {line: i for i, line in enumerate(lines)}
        logits, token_ids = head(hidden.index_select(0, upload(lines, torch.int64, self.device)), group)
        controls, keys = self.controls_and_keys(group)
        cond, uncond = self._columns([(at[pick.cond], at[pick.uncond]) for pick in group], torch.int64)
        return self.model.ops.guided_sample(logits, cond, uncond, token_ids, controls, keys)

    def _code_logits(self, hidden: Tensor, _group: list[Pick]) -> tuple[Tensor, Tensor]:
        return self.model.ops.linear(hidden, self.model.image_head), self.image_tokens

    def _size_logits(self, hidden: Tensor, group: list[Pick]) -> tuple[Tensor, Tensor]:
        choices = upload(group[0].sample.choices(), torch.int64, self.device)
        return self.model.ops.linear(hidden, self.model.lm_head).index_select(1, choices), choices

    def _text_logits(self, hidden: Tensor, group: list[Pick]) -> tuple[Tensor, Tensor]:
        logits = self.model.ops.linear(hidden, self.model.lm_head)
        logits.index_fill_(1, self.not_text, float("-inf"))
        by_line = sorted(group, key=lambda pick: pick.cond)
        barred = [line for line, pick in enumerate(by_line) if not pick.sample.may_start_image]
        if barred:
            starts = logits.select(1, self.vocab.image_start)
            starts.index_fill_(0, upload(barred, torch.int64, self.device), float("-inf"))
        return logits, self.all_tokens

    def controls_and_keys(self, group: Sequence[Pick]) -> tuple[Controls, NoiseKeys]:
        """What draws of one kind are made by, on the device."""
        prefix = "text_" if group[0].sample.next_draw is Draw.TEXT else ""
        floats, whole = [], []
        for pick in group:
            params = pick.sample.params
            temperature, top_k, top_p, min_p = (
                getattr(params, prefix + name) for name in ("temperature", "top_k", "top_p", "min_p")
            )
            guidance = params.guidance_scale if pick.cond != pick.uncond else 1.0
            floats.append((guidance, temperature, top_p, min_p))
            whole.append((top_k, pick.seed, pick.sample.index, pick.index))
        guidance, temperature, top_p, min_p = self._columns(floats, torch.float32)
        top_k, *keys = self._columns(whole, torch.int64)
        return Controls(guidance, temperature, top_k, top_p, min_p), NoiseKeys(*keys)

    def _columns(self, rows: list[tuple], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """A tensor for each column, made by one copy to the device."""
        return upload(list(zip(*rows, strict=True)), dtype, self.device).unbind()


def read(tokens: Tensor) -> list[int]:
    """The numbers of drawn tokens: the only time in a step that the host waits for a GPU.

    Raises FloatingPointError when the logits of one of them were not finite.
    """
    found = tokens.tolist()
    if min(found) < 0:
        raise FloatingPointError("the model's logits are not finite; expected numbers (are the weights sound?)")
    return found
