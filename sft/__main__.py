"""`python -m lumina_rt.sft`: train a checkpoint on tokenised dialogs, alone or under torchrun."""

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from lumina_rt.sft.train import Trainer, TrainingConfig

from lumina_rt.checkpoint import CheckpointError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lumina_rt.sft",
        description="Train a checkpoint on tokenised dialogs. Run the same command again to go on after a kill.",
    )
    parser.add_argument("output", type=Path, help="folder for the trained checkpoint and the state of the run")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder to start from")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of `python -m lumina_rt.sft.data`")
    for field in fields(TrainingConfig):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action="store_true")
        elif field.name == "steps":
            parser.add_argument(flag, type=int, required=True)
        else:
            parser.add_argument(flag, type=field.type, default=field.default)
    args = parser.parse_args(argv)
    if "RANK" in os.environ:  # torchrun's way of telling
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    try:
        config = TrainingConfig(**{field.name: getattr(args, field.name) for field in fields(TrainingConfig)})
        Trainer(args.model, args.data, args.output, config).run()
        if dist.is_initialized():
            dist.barrier()  # the first process still writes files; one that leaves before it may end it
    except (CheckpointError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
