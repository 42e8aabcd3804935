"""The one error for checkpoints: everything that is wrong with one, told at once. Reads no file itself."""

_SHOWN = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be used.

    path: the file or folder.  problems: all that is wrong with it, a line each; the message shows 20,
    and is one line for one problem.
    """

    def __init__(self, path, problems: list[str]):
        super().__init__(path, problems)
        self.path = path
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"cannot load {self.path}: {self.problems[0]}"
        lines = [f"cannot load {self.path}:", *self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"... and {len(self.problems) - _SHOWN} more")
        return "\n  ".join(lines)
