"""What a run keeps: checkpoints to go on from, the models it writes, the parameters at its end."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from deftcore._files import replacing_folder
from deftcore.nn.sharding import is_sharded, whole
from deftcore.training.objective import Objective
from deftcore.training.result import TrainResult
from deftcore.training.run_folder import EVALUATION, RunFolder, load_parameters, save_parameters


class Keeper:
    """Writes and reads a run's folder, together with the other processes: each of them must make the same calls.

    Args:
        folder: of the run.
        model: as before `Accelerator.prepare`.
        save_model: writes the trained part of a model into a folder; None writes no models.
    """

    def __init__(
        self,
        folder: RunFolder,
        model: nn.Module,
        objectives: Sequence[Objective],
        accelerator: Accelerator,
        save_model: Callable[[Any, Path], None] | None,
    ) -> None:
        self.folder, self.model, self.objectives = folder, model, objectives
        self.accelerator, self.save_model = accelerator, save_model
        accelerator.register_save_state_pre_hook(self._save_trainable)
        accelerator.register_load_state_pre_hook(self._load_trainable)

    def start_over(self, main: RunFolder | None = None) -> None:
        """Forgets the run that the folder holds, and the one that it is a phase of."""
        if self.accelerator.is_main_process:
            for folder in (self.folder, main or self.folder):
                folder.clear_all()
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------ models

    def save(self, name: str) -> None:
        """Writes the model as it is now into the run's folder of that name."""
        if self.save_model is not None and self.accelerator.is_main_process:
            with replacing_folder(self.folder.path / name) as folder:
                self.save_model(self.model, folder)
                for objective in self.objectives:
                    objective.save(folder)
        elif self.save_model is not None and any(map(is_sharded, self.model.parameters())):
            with tempfile.TemporaryDirectory() as unused:  # all gather shards, one writes what counts
                self.save_model(self.model, Path(unused))
        self.accelerator.wait_for_everyone()

    def report(self, write: Callable[[Path], None]) -> None:
        """Has what there is to see of the last evaluation written into its folder."""
        if self.accelerator.is_main_process:
            with replacing_folder(self.folder.path / EVALUATION) as folder:
                write(folder)
        else:
            with tempfile.TemporaryDirectory() as unused:
                write(Path(unused))
        self.accelerator.wait_for_everyone()

    def finish(self, result: TrainResult) -> None:
        """The run has come to its end."""
        state = self._whole()
        if self.accelerator.is_main_process:
            with replacing_folder(self.folder.path / "trained") as folder:
                save_parameters(state, folder)
            self.folder.finish(result)
        self.accelerator.wait_for_everyone()

    def load_finished(self) -> None:
        """Loads what `finish` wrote."""
        load_parameters(self._trainable(), self.folder.path / "trained")

    # ------------------------------------------------------------------ checkpoints

    def checkpoint(self, step: int) -> None:
        """Writes what `restore` goes on from: trained parameters, optimizer, schedule and every process's random state
        as they are after `step` steps. It is another checkpoint only once it is whole; the oldest are removed."""
        partial = self.folder.partial_checkpoint(step)
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))  # every process writes its random state
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.keep_checkpoint(step)
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Continues from the newest checkpoint, if there is one."""
        found = self.folder.checkpoints()
        if found:
            self.accelerator.load_state(str(found[-1]))

    def _trainable(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for name, module in self.model.named_modules():  # a BatchNorm's statistics learn in its forward
            if getattr(module, "track_running_stats", False):
                state |= {f"{name}.{own}": value for own, value in module.named_buffers(recurse=False)}
        for i, objective in enumerate(self.objectives):
            prefix = f"objective{i or ''}"
            state |= {f"{prefix}.{name}": value for name, value in objective.state_dict(keep_vars=True).items()}
        return state

    def _whole(self) -> dict[str, Tensor]:
        """As `_trainable`, gathered where it is sharded."""
        return {name: whole(p.detach()) for name, p in self._trainable().items()}

    def _save_trainable(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # in place of the whole model
        state = self._whole()
        if self.accelerator.is_main_process:
            save_parameters(state, Path(folder))

    def _load_trainable(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_parameters(self._trainable(), Path(folder))
