"""Logging: always a file of JSON lines, optionally tensorboard or wandb."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hooked_mamba.durable import room_for, write_file
from saes.options import check_choice


@runtime_checkable
class Logger(Protocol):
    """Takes numbers by name at steps."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One line of JSON per step. A resumed run first drops the lines after its checkpoint.

    Parameters
    ----------
    path
        The file.
    step
        The step from which the run continues.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step] if step else []
        write_file(path, "".join(line + "\n" for line in kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # open as long as the training runs

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, **numbers}) + "\n"
        with room_for(self.path, len(line)):
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed when it was written; a full disk was reported then
            self._file.close()


def _whole_lines(path: Path) -> list[str]:
    """Complete lines; a kill may have cut the last."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines[:-1] if line]


class TensorBoard:
    """Scalars for tensorboard.

    Raises
    ------
    ImportError
        If tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("logging to tensorboard needs the package: pip install tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; project and entity come from its own environment variables.

    Raises
    ------
    ImportError
        If wandb is not installed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ImportError("logging to wandb needs the package: pip install wandb") from None
        self._run: Any = wandb.init(dir=str(folder), config=dict(config), resume="allow")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def make_loggers(names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int = 0) -> list[Logger]:
    """The log file and the loggers named: "tensorboard", "wandb"."""
    for name in names:
        check_choice("a logger", name, ("tensorboard", "wandb"))
    loggers: list[Logger] = []
    if "tensorboard" in names:
        loggers.append(TensorBoard(folder / "tensorboard"))
    if "wandb" in names:
        loggers.append(WandB(folder, config))
    return [JsonLines(folder / "metrics.jsonl", step), *loggers]
