"""What the generation_config.json of a checkpoint says: its sizes, and what it wants where the caller says nothing."""

from pathlib import Path

from lumina_rt import weights
from lumina_rt.checkpoint import CheckpointError
from lumina_rt.params import SamplingParams, from_options

# Areas that the released checkpoints were trained on, the default first; generation_config.json may name others.
TARGET_SIZES = (768, 512, 1024, 384)


def target_sizes_of(folder: Path) -> tuple[int, ...]:
    """The roots of the areas that a model was trained on, its default first. Raises CheckpointError."""
    path = folder / "generation_config.json"
    sizes = weights.read_json(path).get("target_sizes", TARGET_SIZES) if path.exists() else TARGET_SIZES
    if not isinstance(sizes, (list, tuple)) or not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise CheckpointError(folder, [f"target_sizes is {sizes!r} in {path.name}; expected a list of whole numbers"])
    return tuple(sizes)


def sampling_defaults_of(folder: Path, key: str = "sampling") -> dict:
    """What a model wants fields of SamplingParams to be, by a key of its generation_config.json.

    key: "sampling", or "editing" for what differs in edits. Raises CheckpointError. Other keys of that file
    are not looked at: released ones name a temperature that the reference's own scripts do not use.
    """
    path = folder / "generation_config.json"
    defaults = weights.read_json(path).get(key, {}) if path.exists() else {}
    try:
        from_options(SamplingParams, dict(defaults))
    except (TypeError, ValueError) as error:
        raise CheckpointError(folder, [f"{key} is {defaults!r} in {path.name}: {error}"]) from None
    return dict(defaults)
