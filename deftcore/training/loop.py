"""A small training loop on Accelerate: one process or many, resumable bit for bit.

Losses are means over the tokens of the whole global batch, however it is split over processes and accumulation steps;
so is the density loss (sums and counts are reduced, not ratios).
"""

import atexit
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import get_scheduler

from deftcore._files import replacing_folder
from deftcore.methods.deft.objective import DensityLoss
from deftcore.methods.s2ft.layer import S2ftLayer
from deftcore.nn.linear import PackedModule
from deftcore.nn.preparation import checkpoint_activations
from deftcore.nn.sharding import is_sharded, whole
from deftcore.training import sizes
from deftcore.training.data import Batches, Example, predicts
from deftcore.training.identity import dependences
from deftcore.training.recipe import TrainingConfig
from deftcore.training.run_folder import RunFolder, load_parameters, save_parameters

_log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a run came to. Losses are nats per predicted token."""

    steps: int
    train_loss: float
    eval_loss: float | None
    best_eval_loss: float | None
    density: float | None  # of the last evaluation (training where there was none)
    density_blocks: dict[str, float] | None
    seconds: float
    best_step: int | None = None  # whose model is in best/

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _State:
    """Where a run stands; saved with each checkpoint."""

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    train_loss: float = math.nan

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.best_step = int(state["step"]), int(state["best_step"])
        self.best, self.train_loss = float(state["best"]), float(state["train_loss"])


def train(
    model: Any,
    examples: list[Example],
    config: TrainingConfig,
    output: str | Path,
    *,
    validation: list[Example] | None = None,
    objective: DensityLoss | None = None,
    pad_token_id: int = 0,
    resume: bool = True,
    label: str = "train",
    save_model: Callable[[nn.Module, Path], None] | None = None,
    depends_on: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> TrainResult:
    """Trains every parameter that requires a gradient, and the objective's own.

    `output` receives run.json (what the run depends on), log.jsonl, checkpoints/ (the newest two), at the end
    result.json and trained/ (the trained parameters), and, with `save_model`, final/ and best/ (lowest validation
    loss). Everything is written under a temporary name and renamed.

    A second call with the same `output` continues the run from its newest checkpoint, exactly; after the run's end it
    loads the trained parameters, says that the run has finished, and returns its result. It must be the same run: the
    same settings (but for logging, evaluating, saving and activation checkpointing), number of steps and of processes,
    examples, objective, adapter, frozen weights, trained parameters by name and shape, and `depends_on`. Other
    versions of PyTorch and the like are only warned of.

    Args:
        model: takes input_ids, attention_mask, labels and returns an object with `.loss` (mean over labels).
        examples, validation: token sequences; see `deftcore.training.data`.
        objective: added to the task loss, and reported.
        resume: whether to continue; False forgets the run that `output` holds.
        label: what the progress bar says.
        save_model: writes the trained part of the model into a folder.
        depends_on: what else makes this run another one, as plain values by name.
        files: texts to write into `output` once the run may begin, by name.

    Raises:
        ValueError: no examples, an example without labels, validation without any, fewer of either than processes, no
            trainable parameter; `output` holds another run (naming what differs, old and new).
    """
    if not examples:
        raise ValueError("examples: must not be empty")
    # An earlier run in this process may have had another precision or device.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    constant = any(isinstance(module, (PackedModule, S2ftLayer)) for module in model.modules())
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=next(model.parameters()).device.type == "cpu",
        # Packed weights and original slices are buffers, and never change: no reason to send them before every forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not constant)],
        log_with=[name for name in config.logger if name != "jsonl"] or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(output) / "tensorboard")),
    )
    if accelerator.num_processes > 1:
        # An interpreter that exits under Gloo's threads may abort; a group its owner already destroyed is left alone.
        atexit.register(PartialState().destroy_process_group)
    set_seed(config.seed)
    run = _Run(
        model, examples, config, Path(output), validation, objective, pad_token_id, label, save_model, accelerator,
        depends_on or {},
    )  # fmt: skip
    try:
        run.folder.check() if resume else run.start_over()
        done = run.finished()
        return done if done is not None else run.train(files or {})
    finally:
        for tracker in accelerator.trackers:  # `end_training` would also destroy a group that others own
            tracker.finish()
        # Accelerate leaves its autocast around `forward`; afterwards the model computes in its own dtypes again.
        accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)


class _Run:
    def __init__(
        self,
        model: Any,
        examples: list[Example],
        config: TrainingConfig,
        output: Path,
        validation: list[Example] | None,
        objective: DensityLoss | None,
        pad_token_id: int,
        label: str,
        save_model: Callable[[nn.Module, Path], None] | None,
        accelerator: Accelerator,
        depends_on: Mapping[str, Any],
    ) -> None:
        self.config, self.objective, self.label = config, objective, label
        self.save_model, self.accelerator = save_model, accelerator
        self.pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        where = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        self.batches = Batches(examples, config.batch_size, pad_token_id, self.pair, config.seed, **where)
        self.validation = (
            Batches(validation, config.batch_size, pad_token_id, self.pair, shuffle=False, **where)
            if validation
            else None
        )
        silent = [i for i, example in enumerate(examples) if not predicts(example, self.pair)]
        if silent:  # the mean loss of a batch of them is NaN
            raise ValueError(
                f"examples: {len(silent)} of {len(examples)} have nothing to predict, first example {silent[0]}"
            )
        if validation and not any(predicts(example, self.pair) for example in validation):
            raise ValueError(f"validation: none of {len(validation)} has anything to predict")
        for name, batches in (("examples", self.batches), ("validation", self.validation)):
            if batches is None:
                continue
            if len(batches) == 0:
                count = len(batches.examples)
                raise ValueError(f"{name}: {count} are too few for {accelerator.num_processes} processes")
            if batches.left_out and accelerator.is_main_process:
                _log.warning(
                    "%s: the last %d of an epoch's %d are left out, fewer than the %d processes",
                    name, batches.left_out, len(batches.examples), accelerator.num_processes,
                )  # fmt: skip
        per_epoch = math.ceil(len(self.batches) / config.gradient_accumulation_steps)
        self.per_epoch = per_epoch
        self.total = config.max_steps or max(math.ceil(per_epoch * config.epochs), 1)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        gates = list(objective.parameters()) if objective is not None else []
        if not trainable:
            raise ValueError("model: no parameter requires a gradient")
        found = dependences(
            model, config, objective, examples, validation, steps=self.total, processes=accelerator.num_processes
        )
        self.folder = RunFolder(output, {**depends_on, **found})
        groups = [{"params": trainable, "weight_decay": config.weight_decay}]
        if gates:
            groups.append({"params": gates, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        warmup = round(config.warmup_ratio * self.total)
        schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=self.total)
        self.plain_model = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.scheduler = scheduler
        self.state = _State()
        accelerator.register_for_checkpointing(self.state, scheduler)
        accelerator.register_save_state_pre_hook(self._save_trainable)
        accelerator.register_load_state_pre_hook(self._load_trainable)

    # ------------------------------------------------------------------ steps

    def finished(self) -> TrainResult | None:
        """The result of this run where it has come to its end already; its trained parameters are loaded."""
        result = self.folder.result()
        if result is None:
            return None
        if self.accelerator.is_main_process:
            _log.warning("%s: already finished, in %d steps; nothing was trained", self.folder.path, result["steps"])
        load_parameters(self._trainable(), self.folder.path / "trained")
        return TrainResult(**result)

    def train(self, files: Mapping[str, str]) -> TrainResult:
        config, state = self.config, self.state
        start = time.perf_counter()
        if self.accelerator.is_main_process:
            self.folder.begin(files)
            lines = sizes.describe(self.plain_model, self._parameters())
            Console(stderr=True).print(*lines, sep="\n", soft_wrap=True, highlight=False)
        self.accelerator.wait_for_everyone()
        about = {"name": self.folder.path.name, "dir": str(self.folder.path), "config": asdict(config)}
        self.accelerator.init_trackers("deftcore", init_kwargs={"wandb": about})
        self._restore()
        last = {"loss": state.train_loss}
        self.model.train()
        with self._progress() as progress:
            task = progress.add_task(self.label, total=self.total, completed=state.step, note="")
            while state.step < self.total:
                epoch, first = divmod(state.step, self.per_epoch)
                for window in self._windows(epoch, first):
                    last = self._step(window)
                    state.step += 1
                    state.train_loss = last["loss"]
                    note = f"loss {last['loss']:.3f}"
                    if "density" in last:
                        note += f"  density {last['density']:.3f}"
                    progress.update(task, completed=state.step, note=note)
                    if state.step % config.log_every == 0 or state.step == self.total:
                        self._log({"step": state.step, **last})
                    if config.eval_every and state.step % config.eval_every == 0 and state.step < self.total:
                        self._evaluate_and_keep()
                    if config.save_every and state.step % config.save_every == 0 and state.step < self.total:
                        self._checkpoint()
                    if state.step >= self.total:
                        break
            evaluated = self._evaluate_and_keep()
        self._save("final")
        report = evaluated.get("report") or (self.objective.report() if self.objective is not None else None)
        result = TrainResult(
            steps=state.step,
            train_loss=state.train_loss,
            eval_loss=evaluated.get("eval_loss"),
            best_eval_loss=None if math.isinf(state.best) else state.best,
            density=None if report is None else report["density"],
            density_blocks=None if report is None else report["blocks"],
            seconds=time.perf_counter() - start,
            best_step=state.best_step or None,
        )
        whole_state = self._whole()
        if self.accelerator.is_main_process:
            with replacing_folder(self.folder.path / "trained") as folder:
                save_parameters(whole_state, folder)
            self.folder.finish(result.to_dict())
        self.accelerator.wait_for_everyone()
        return result

    def _windows(self, epoch: int, first: int) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of each step, from step `first` of the epoch on."""
        size = self.config.gradient_accumulation_steps
        window: list[dict[str, Tensor]] = []
        for batch in self.batches.epoch(epoch, first * size):
            window.append({k: v.to(self.accelerator.device) for k, v in batch.items()})
            if len(window) == size:
                yield window
                window = []
        if window:
            yield window

    def _step(self, window: list[dict[str, Tensor]]) -> dict[str, float]:
        accelerator, objective = self.accelerator, self.objective
        counts = torch.tensor(
            [self._predicted(batch) for batch in window], dtype=torch.float64, device=accelerator.device
        )
        total = accelerator.reduce(counts.sum(), "sum").clamp(min=1)
        tokens = objective.window_tokens(window, device=accelerator.device) if objective is not None else None
        if objective is not None:
            objective.reset()
            objective.set_progress(self.state.step / self.total)
        task_loss, extra_loss = 0.0, 0.0
        for i, batch in enumerate(window):
            last = i + 1 == len(window)
            with accelerator.no_sync(self.model) if not last else nullcontext():
                with accelerator.autocast():
                    output = self.model(**batch)
                # DistributedDataParallel averages gradients over processes; the world size undoes that.
                task = output.loss.float() * (counts[i] / total * accelerator.num_processes).float()
                loss = task
                if objective is not None:
                    extra = objective.loss(tokens=tokens, parts=len(window)).to(task.device)
                    loss = task + extra
                    extra_loss += float(extra.detach()) / accelerator.num_processes
                accelerator.backward(loss)
            task_loss += float(task.detach()) / accelerator.num_processes
        sums = accelerator.reduce(torch.tensor([task_loss, extra_loss], device=accelerator.device), "sum").tolist()
        if not math.isfinite(sum(sums)):
            raise RuntimeError(f"{self.label}: the loss is {sum(sums)} at step {self.state.step + 1}")
        if objective is not None and objective.gates is not None:
            objective.gates.reduce_gradient()
        if self.config.max_grad_norm:
            accelerator.clip_grad_norm_(self._parameters(), self.config.max_grad_norm)
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        result = {"loss": sums[0], "learning_rate": rate}
        if objective is not None:
            result |= {"density_loss": sums[1], "density": self._gather_density()["density"]}
        return result

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _predicted(self, batch: dict[str, Tensor]) -> int:
        """Number of labels that the model's mean loss runs over; decoder-only models shift them by one."""
        labels = batch["labels"] if self.pair else batch["labels"][:, 1:]
        return int((labels != -100).sum())

    # ------------------------------------------------------------------ evaluation and files

    @torch.no_grad()
    def _evaluate(self) -> dict[str, Any]:
        if self.validation is None:
            return {}
        self.model.eval()
        if self.objective is not None:
            self.objective.reset()
        total = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for batch in self.validation.epoch(0):
            batch = {k: v.to(self.accelerator.device) for k, v in batch.items()}
            with self.accelerator.autocast():
                loss = self.model(**batch).loss
            count = self._predicted(batch)
            total += torch.tensor(
                [float(loss) * count if count else 0.0, count], dtype=torch.float64, device=total.device
            )
        self.model.train()
        loss_sum, count = self.accelerator.reduce(total, "sum").tolist()
        result: dict[str, Any] = {"eval_loss": loss_sum / max(count, 1)}
        if self.objective is not None:
            result["report"] = self._gather_density()
        return result

    def _gather_density(self) -> dict[str, Any]:
        assert self.objective is not None
        return self.objective.report(reduce=lambda x: self.accelerator.reduce(x.to(self.accelerator.device), "sum"))

    def _evaluate_and_keep(self) -> dict[str, Any]:
        evaluated = self._evaluate()
        if evaluated:
            entry = {"step": self.state.step, "eval_loss": evaluated["eval_loss"]}
            if "report" in evaluated:
                entry |= {"eval_density": evaluated["report"]["density"]}
            self._log(entry)
            if evaluated["eval_loss"] < self.state.best:
                self.state.best, self.state.best_step = evaluated["eval_loss"], self.state.step
                self._save("best")
        return evaluated

    def _save(self, name: str) -> None:
        main, sharded = self.accelerator.is_main_process, any(map(is_sharded, self.plain_model.parameters()))
        if self.save_model is not None and main:
            with replacing_folder(self.folder.path / name) as folder:
                self.save_model(self.plain_model, folder)
                if self.objective is not None and self.objective.gates is not None:
                    self.objective.gates.save(folder)
        elif self.save_model is not None and sharded:  # all processes gather shards, one writes what counts
            with tempfile.TemporaryDirectory() as unused:
                self.save_model(self.plain_model, Path(unused))
        self.accelerator.wait_for_everyone()

    def _checkpoint(self) -> None:
        partial = self.folder.partial_checkpoint(self.state.step)
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))  # every process writes its random state
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.keep_checkpoint(self.state.step)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        """Continues from the newest checkpoint, if there is one."""
        found = self.folder.checkpoints()
        if found:
            self.accelerator.load_state(str(found[-1]))
        if self.accelerator.is_main_process:
            self.folder.trim_log(self.state.step)

    def start_over(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.clear()
        self.accelerator.wait_for_everyone()

    def _trainable(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {name: p for name, p in self.plain_model.named_parameters() if p.requires_grad}
        gates = self.objective.named_parameters() if self.objective is not None else ()
        return state | {f"objective.{name}": p for name, p in gates}

    def _whole(self) -> dict[str, Tensor]:
        """As `_trainable`, gathered where it is sharded; every process must call it."""
        return {name: whole(p.detach()) for name, p in self._trainable().items()}

    def _save_trainable(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # in place of the whole model
        state = self._whole()
        if self.accelerator.is_main_process:
            save_parameters(state, Path(folder))

    def _load_trainable(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_parameters(self._trainable(), Path(folder))

    def _log(self, entry: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.folder.append_log(entry)
            self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=entry["step"])

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        return Progress(*columns, console=Console(stderr=True), disable=not self.accelerator.is_main_process)
