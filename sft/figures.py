"""The pictures and tables of docs/: what the paper found of its model, found again in the embedded one.

`python -m lumina_rt.sft.figures docs` draws pictures by prompt, quality against each control of sampling (paper,
figures 8 and 9), where the last token of an image looks (figure 5), and which codes were guessed right.
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from lumina_rt.sft import evaluate
from lumina_rt.sft.model import TrainableModel
from matplotlib import pyplot as plt

from lumina_rt import Engine, SamplingParams, hub, prompts, unirep, weights
from lumina_rt.unirep import Slot

SWEEPS = {
    "guidance_scale": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0),
    "temperature": (0.0, 0.4, 0.7, 1.0, 1.4, 2.0),
    "top_k": (1, 5, 20, 100, 500, 2000),
    "min_p": (0.0, 0.01, 0.03, 0.1, 0.3),
}


def pictures(engine: Engine, path: Path, columns: int = 6, rows: int = 5) -> None:
    """A grid of pictures with their prompts, from the cases of the evaluation, none of them chosen."""
    cases = evaluate.text_to_image_cases(engine, columns * rows)
    images = evaluate.draw(engine, cases)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.3 * rows))
    for axis, case, image in zip(axes.flat, cases, images, strict=True):
        axis.imshow(image, interpolation="nearest")
        right = evaluate.is_right(case, image)
        axis.set_title(_wrapped(case.caption), fontsize=7, color="black" if right else "tab:red")
        axis.axis("off")
    _save(figure, path)


def sweeps(engine: Engine, folder: Path, n: int) -> dict[str, dict[str, float]]:
    """Draw quality against each control, the others at their defaults. Returns the figures."""
    found: dict[str, dict[str, float]] = {}
    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(4 * len(SWEEPS), 3.2), sharey=True)
    for axis, (name, values) in zip(axes, SWEEPS.items(), strict=True):
        shares = [evaluate.text_to_image(engine, n, **{name: value})["overall"] for value in values]
        found[name] = {str(value): share for value, share in zip(values, shares, strict=True)}
        axis.plot(range(len(values)), shares, marker="o")
        axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axis.axvline(_index_of_default(name), color="gray", linestyle=":", linewidth=1)
        axis.set_xlabel(name)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"right, of {n} held-out prompts")
    _save(figure, folder / "sampling.png")
    return found


def guidance_strip(engine: Engine, path: Path) -> None:
    """The same prompts and seeds at growing guidance."""
    cases = [case for case in evaluate.text_to_image_cases(engine, 24) if case.size == engine.default_size][:6]
    scales = SWEEPS["guidance_scale"]
    figure, axes = plt.subplots(len(cases), len(scales), figsize=(1.6 * len(scales), 1.7 * len(cases)))
    for column, scale in enumerate(scales):
        for row, image in enumerate(evaluate.draw(engine, cases, guidance_scale=scale)):
            axes[row, column].imshow(image, interpolation="nearest")
            axes[row, column].axis("off")
        axes[0, column].set_title(f"{scale:g}", fontsize=9)
    _save(figure, path)


KINDS = {Slot.CODE: "tab:gray", Slot.HEIGHT: "tab:green", Slot.END_OF_LINE: "tab:orange", Slot.START: "tab:red"}


@torch.no_grad()
def attention(engine: Engine, folder: Path, path: Path, n: int = 24) -> dict[str, float]:
    """Draw the mean attention of an image's last code, over heads, layers and `n` pictures of the default size.

    Returns the mean weight of a place of each kind.
    """
    config = weights.stored_config(folder)
    model = TrainableModel(config)
    model.load_state_dict(weights.read_state(folder, config))
    layout = unirep.Layout.from_size(*engine.default_size, engine.grammar.factor)
    length = layout.n_tokens - 2  # up to the last code; a line end and the image's end follow
    cases = [case for case in evaluate.text_to_image_cases(engine, 3 * n) if case.size == engine.default_size][:n]
    texts = [prompts.text_to_image(case.caption, *case.size) for case in cases]
    outputs = engine.generate(texts, engine.params(num_images=1, size=engine.default_size, seed=0))
    seen, of_prompt = [], []
    for text, output in zip(texts, outputs, strict=True):
        tokens = prompts.encode_conversation(text, engine.tokenizer, engine.encode_image) + output.token_ids[:length]
        weight = attention_of_last(model, torch.tensor([tokens]))
        seen.append(weight[-length:])
        of_prompt.append(weight[:-length].mean())
    mean = np.mean(seen, 0)
    slots = [Slot.HEIGHT if i in (1, 2) else layout.slot(i) for i in range(length)]
    found = {"prompt": float(np.mean(of_prompt))}
    figure, axis = plt.subplots(figsize=(11, 3))
    for kind, color in KINDS.items():
        places = [i for i, slot in enumerate(slots) if slot is kind]
        name = "size" if kind is Slot.HEIGHT else kind.name.lower().replace("_", " ")
        axis.bar(places, mean[places], width=1.0, color=color, label=name)
        found[name] = float(mean[places].mean())
    axis.set_yscale("log")
    axis.set_xlabel("place, counted from <start-of-image>")
    axis.set_ylabel("mean attention of the last code")
    axis.legend(ncols=len(KINDS), fontsize=8)
    _save(figure, path)
    return found


@torch.no_grad()
def attention_of_last(model: TrainableModel, tokens: torch.Tensor) -> np.ndarray:
    """Where the last of tokens, int64 [1, n], looks: the mean over layers and heads. Returns [n], of sum 1."""
    heads: list[torch.Tensor] = []  # q and k of each layer, normed and rotated: [1, n, heads, head_dim]
    hooks = [
        norm.register_forward_hook(lambda module, inputs, output: heads.append(output))
        for layer in model.model.layers
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    total = torch.zeros(tokens.shape[1])
    for q, k in zip(heads[::2], heads[1::2], strict=True):
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("hd,nhd->hn", q[0, -1], k[0]) * q.shape[-1] ** -0.5
        total += scores.softmax(-1).mean(0)
    return (total / len(model.model.layers)).numpy()


def acceptance(engine: Engine, path: Path, n: int, guidance_scale: float = 3.0) -> np.ndarray:
    """Draw how often each code of a picture of the default size came without a step of its own, over `n` pictures.

    engine: one that tries several draws a step.  Returns the shares, float [rows, columns].
    """
    layout = unirep.Layout.from_size(*engine.default_size, engine.grammar.factor)
    held = np.zeros((layout.rows, layout.columns + 1))  # a line end after each row
    commit = engine.scheduler.commit

    def note(plan, drawn):
        kept = commit(plan, drawn)
        for work, tokens in zip(plan, kept, strict=True):
            for index in work.indices[1 : len(tokens)]:  # the first draw is what the step was for
                held.flat[index - work.sample.image_start - 3] += 1
        return kept

    engine.scheduler.commit = note
    cases = evaluate.text_to_image_cases(engine, n)
    texts = [prompts.text_to_image(case.caption, *engine.default_size) for case in cases]
    params = engine.params(num_images=1, size=engine.default_size, seed=0, guidance_scale=guidance_scale)
    engine.generate(texts, params)
    engine.scheduler.commit = commit
    shares = held[:, :-1] / n
    figure, axis = plt.subplots(figsize=(4.5, 3.6))
    shown = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(shown, label="share that took no step of its own")
    axis.set_xlabel("column of codes")
    axis.set_ylabel("row of codes")
    _save(figure, path)
    return shares


def page(found: dict[str, dict[str, float]], n: int) -> str:
    """docs/README.md: every picture with what the paper says, and the figures behind it."""
    tables = {}
    for name, values in found.items():
        rows = [
            f"| {key} | {value:.4f} |" if name == "attention" else f"| {key} | {value:.3f} |"
            for key, value in values.items()
        ]
        head = "place | mean weight" if name == "attention" else f"{name} | right"
        tables[name] = "\n".join((f"| {head} |", "| --- | --- |", *rows))
    return PAGE.format(n=n, **tables)


PAGE = """\
# What the paper found, in small

Made by `python -m lumina_rt.sft.figures docs` from the embedded model.

## Pictures

Held-out prompts at the default settings, none of them chosen; a red prompt was missed.

![pictures](pictures.png)

## Controls of sampling

The share of {n} held-out prompts that is right, each control moved alone; the dotted line is the runtime's
default, which a model may change. The paper
finds that quality rises with guidance, then falls (figure 8); that a low temperature or a small top-k makes pictures
plain, and a high temperature breaks them (figure 9); and it samples with min-p.

![quality against each control](sampling.png)

The same six prompts and seeds at growing guidance:

![pictures at growing guidance](guidance.png)

{guidance_scale}

{temperature}

{top_k}

{min_p}

## Where the last token of an image looks

The mean attention of an image's last code over heads, layers and 24 pictures. The paper finds sinks at
`<start-of-image>` and `<end-of-line>` (figure 5).

![attention](attention.png)

{attention}

## Which codes were guessed right

How often each code of a picture took no step of its own, with up to 16 draws a step and a guidance scale of 3, over {n}
held-out prompts. A code is guessed as the last step drew it, or as its left neighbour.

![share of codes that took no step of their own](acceptance.png)
"""


def _index_of_default(name: str) -> float:
    values, default = SWEEPS[name], getattr(SamplingParams, name)
    return float(np.interp(default, values, range(len(values))))


def _wrapped(text: str, width: int = 26) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lumina_rt.sft.figures", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("-n", type=int, default=120, help="prompts for each point of a curve")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    engine = Engine.from_pretrained(args.model)
    pictures(engine, args.folder / "pictures.png")
    guidance_strip(engine, args.folder / "guidance.png")
    found = {"attention": attention(engine, hub.find_model(args.model), args.folder / "attention.png")}
    found |= sweeps(engine, args.folder, args.n)
    acceptance(Engine.from_pretrained(args.model, speculation=16), args.folder / "acceptance.png", args.n)
    (args.folder / "README.md").write_text(page(found, args.n))


if __name__ == "__main__":
    main()
