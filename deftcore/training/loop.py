"""A small training loop on Accelerate: one process or many, resumable bit for bit.

Losses are means over the tokens of the whole global batch, however it is split over processes and accumulation steps;
so are those of objectives (sums and counts are reduced, not ratios).
"""

import atexit
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from transformers import get_scheduler

from deftcore._progress import steps_bar
from deftcore.nn.preparation import checkpoint_activations
from deftcore.training import sizes
from deftcore.training.config import TrainingConfig
from deftcore.training.decay import spare_from_decay, without_decay
from deftcore.training.evaluation import Evaluated, check_best_by, evaluate, measure
from deftcore.training.identity import dependences
from deftcore.training.keeper import Keeper
from deftcore.training.objective import Objective, listed, numbers
from deftcore.training.result import State, TrainResult
from deftcore.training.run_folder import RunFolder
from deftcore.training.task import Batch, Batches, Task
from deftcore.training.text import TextTask

_log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The loss of a step is no number any more.

    Args:
        label: of the run.
        loss: what it is.
        step: counted from 1.
    """

    def __init__(self, label: str, loss: float, step: int) -> None:
        super().__init__(f"{label}: the loss is {loss} at step {step}")
        self.step = step


def train(
    model: Any,
    examples: Sequence[Any],
    config: TrainingConfig,
    output: str | Path,
    *,
    validation: Sequence[Any] | None = None,
    task: Task | None = None,
    objective: Objective | Sequence[Objective] | None = None,
    optimizer: Callable[[Any], Optimizer] | None = None,
    resume: bool = True,
    label: str = "train",
    save_model: Callable[[Any, Path], None] | None = None,
    depends_on: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    phase_of: RunFolder | None = None,
) -> TrainResult:
    """Trains every parameter that requires a gradient, and the objectives' own.

    `output` receives run.json (what the run depends on), log.jsonl, checkpoints/ (the newest two), at the end
    result.json and trained/ (the trained parameters), and, with `save_model`, final/ and best/ (lowest validation
    loss, or highest metric of the name `config.best_by`); evaluation/ holds what the task has to show of the last
    evaluation. Everything is written under a temporary name and renamed.

    A second call with the same `output` continues the run from its newest checkpoint, exactly; after the run's end it
    loads the trained parameters, says that the run has finished, and returns its result. It must be the same run: the
    same settings (but for logging, evaluating, saving and activation checkpointing), number of steps and of processes,
    examples, objectives, adapter, frozen weights, trained parameters by name and shape, and `depends_on`. Other
    versions of PyTorch and the like are only warned of.

    Args:
        model: one that the task can call.
        examples, validation: what the task collates into batches; of `TextTask` token sequences, see
            `deftcore.training.data`.
        task: the data and its loss; None is `TextTask`, without padding but zeros.
        objective: added to the task's loss, and reported; one or several, whose names and measures differ.
        optimizer: makes that of the model's trainable parameters; None is AdamW with the learning rate of `config`,
            and its weight decay but for biases and norms. Parameters of objectives join it, without weight decay.
        resume: whether to continue; False forgets the run that `output` holds.
        label: what the progress bar says.
        save_model: writes the trained part of the model into a folder.
        depends_on: what else makes this run another one, as plain values by name.
        files: texts to write into `output` once the run may begin, by name.
        phase_of: the run that this one is a phase of, in a folder inside. What that one's folder holds must be the
            same run too, or is forgotten too.

    Raises:
        ValueError: no examples, an example without labels, validation without any, fewer of either than processes, no
            trainable parameter, objectives of one name, the best by a metric that the task does not have, or without
            validation; `output` holds another run (naming what differs, old and new).
        Diverged: a step's loss is infinite or NaN.
    """
    if not examples:
        raise ValueError("examples: must not be empty")
    objectives = listed(objective)
    # An earlier run in this process may have had another precision or device.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    constant = any(getattr(module, "constant_buffers", False) for module in model.modules())
    device = next(model.parameters()).device
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=device.type == "cpu",
        # Packed weights and original slices are buffers, and never change: no reason to send them before every forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not constant)],
        log_with=[name for name in config.logger if name != "jsonl"] or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(output) / "tensorboard")),
    )
    if accelerator.num_processes == 1:  # Accelerate would take the current one of its kind
        PartialState().device = accelerator.state.device = device  # what is made later copies the former
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # There Accelerate would compute in float32 without a word.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    if accelerator.num_processes > 1:
        # An interpreter that exits under Gloo's threads may abort; a group its owner already destroyed is left alone.
        atexit.register(PartialState().destroy_process_group)
    set_seed(config.seed)
    if task is None:
        task = TextTask(is_encoder_decoder=bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)))
    run = _Run(model, examples, validation, config, task, objectives, accelerator, label)
    run.prepare(optimizer, Path(output), depends_on or {}, save_model)
    try:
        if not resume:
            run.keeper.start_over(phase_of)
        elif phase_of is not None:
            phase_of.check(whole=False)
        run.folder.check()
        done = run.finished()
        return done if done is not None else run.train(files or {})
    finally:
        for tracker in accelerator.trackers:  # `end_training` would also destroy a group that others own
            tracker.finish()
        # Accelerate leaves its autocast around `forward`; afterwards the model computes in its own dtypes again.
        accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)


class _Run:
    folder: RunFolder
    keeper: Keeper

    def __init__(
        self,
        model: Any,
        examples: Sequence[Any],
        validation: Sequence[Any] | None,
        config: TrainingConfig,
        task: Task,
        objectives: list[Objective],
        accelerator: Accelerator,
        label: str,
    ) -> None:
        self.config, self.task, self.objectives = config, task, objectives
        self.accelerator, self.label, self.plain_model = accelerator, label, model
        where: dict[str, Any] = {
            "process": accelerator.process_index, "processes": accelerator.num_processes, "device": accelerator.device,
        }  # fmt: skip
        check_best_by(config, task, validation)
        of_task = {"batch_size": config.batch_size, "collate": task.collate, "draw": task.draw, **where}
        if config.batch_size < task.smallest:
            raise ValueError(f"training.batch_size: must be at least {task.smallest}, got {config.batch_size}")
        self.batches = Batches(examples, seed=config.seed, smallest=task.smallest, **of_task)
        self.validation = Batches(validation, shuffle=False, **of_task) if validation else None
        silent = [i for i, example in enumerate(examples) if not task.predicts(example)]
        if silent:  # the mean loss of a batch of them is NaN
            raise ValueError(
                f"examples: {len(silent)} of {len(examples)} have nothing to predict, first example {silent[0]}"
            )
        if validation and not any(map(task.predicts, validation)):
            raise ValueError(f"validation: none of {len(validation)} has anything to predict")
        for name, batches in (("examples", self.batches), ("validation", self.validation)):
            if batches is None:
                continue
            if len(batches) == 0:
                count = len(batches.examples)
                raise ValueError(f"{name}: {count} are too few for {accelerator.num_processes} processes")
            if batches.left_out and accelerator.is_main_process:
                _log.warning(
                    "%s: the last %d of an epoch's %d are left out, too few for a batch of %d processes",
                    name, batches.left_out, len(batches.examples), accelerator.num_processes,
                )  # fmt: skip
        self.per_epoch = math.ceil(len(self.batches) / config.gradient_accumulation_steps)
        self.total = config.max_steps or max(math.ceil(self.per_epoch * config.epochs), 1)

    def prepare(
        self,
        make_optimizer: Callable[[Any], Optimizer] | None,
        output: Path,
        depends_on: Mapping[str, Any],
        save_model: Callable[[Any, Path], None] | None,
    ) -> None:
        """Everything that is made for a run, and its folder, in which nothing is changed yet."""
        model, config, accelerator = self.plain_model, self.config, self.accelerator
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("model: no parameter requires a gradient")
        validation = None if self.validation is None else self.validation.examples
        found = dependences(
            model, config, self.objectives, self.task, self.batches.examples, validation,
            steps=self.total, processes=accelerator.num_processes,
        )  # fmt: skip
        self.folder = RunFolder(output, {**found, **depends_on})  # of an adapter what was asked for, not what it became
        if make_optimizer is None:
            rate, decay = config.learning_rate, config.weight_decay
            optimizer: Optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=decay)
            spare_from_decay(optimizer, without_decay(model))
        else:
            optimizer = make_optimizer(model)
        spare_from_decay(optimizer, [p for objective in self.objectives for p in objective.undecayed()])
        for objective in self.objectives:
            for group in objective.groups(config.learning_rate):
                optimizer.add_param_group(group)
        warmup = round(config.warmup_ratio * self.total)
        if warmup and self.total == 1:
            got = config.warmup_ratio
            raise ValueError(f"training.warmup_ratio: the only step would be one of warm-up, at a rate of 0, got {got}")
        schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        self.scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=self.total)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.state = State()
        accelerator.register_for_checkpointing(self.state, self.scheduler)
        self.keeper = Keeper(self.folder, model, self.objectives, accelerator, save_model)

    # ------------------------------------------------------------------ steps

    def finished(self) -> TrainResult | None:
        """The result of this run where it has come to its end already; its trained parameters are loaded."""
        result = self.folder.result()
        if result is None:
            return None
        if self.accelerator.is_main_process:
            _log.warning(
                "%s: already finished, in %d steps; nothing was trained. Train anew with --restart (in Python "
                "resume=False)", self.folder.path, result.steps,
            )  # fmt: skip
        self.keeper.load_finished()
        return result

    def train(self, files: Mapping[str, str]) -> TrainResult:
        try:
            return self._train(files)
        except KeyboardInterrupt as stop:
            step = self.folder.last_step()
            told = f"the same command, without --restart, continues from step {step}"
            none = f"no checkpoint was there yet (training.save_every): the same command begins {self.label} again"
            raise KeyboardInterrupt(told if step else none) from stop

    def _train(self, files: Mapping[str, str]) -> TrainResult:
        config, state = self.config, self.state
        start = time.perf_counter()
        if self.accelerator.is_main_process:
            self.folder.begin(files)
            lines = sizes.describe(self.plain_model, self.optimizer.optimizer)
            Console(stderr=True).print(*lines, sep="\n", soft_wrap=True, highlight=False)
        self.accelerator.wait_for_everyone()
        about = {"name": self.folder.path.name, "dir": str(self.folder.path), "config": asdict(config)}
        self.accelerator.init_trackers("deftcore", init_kwargs={"wandb": about})
        self.keeper.restore()
        if self.accelerator.is_main_process:
            if state.step:
                _log.warning("%s: continues from step %d of %d", self.folder.path, state.step, self.total)
            self.folder.trim_log(state.step)
        last = {"loss": state.train_loss}
        self.model.train()
        with steps_bar(Console(stderr=True), disable=not self.accelerator.is_main_process) as progress:
            task = progress.add_task(self.label, total=self.total, completed=state.step, note="")
            while state.step < self.total:
                epoch, first = divmod(state.step, self.per_epoch)
                for window in self._windows(epoch, first):
                    last = self._step(window)
                    state.step += 1
                    state.train_loss = last["loss"]
                    shown = {k: v for k, v in last.items() if k != "learning_rate" and not k.endswith("_loss")}
                    note = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
                    progress.update(task, completed=state.step, note=note)
                    if state.step % config.log_every == 0 or state.step == self.total:
                        self._log({"step": state.step, **last})
                    if config.eval_every and state.step % config.eval_every == 0 and state.step < self.total:
                        self._evaluate_and_keep()
                    if config.save_every and state.step % config.save_every == 0 and state.step < self.total:
                        self.keeper.checkpoint(state.step)
                    if state.step >= self.total:
                        break
            evaluated = self._evaluate_and_keep()
        self.keeper.save("final")
        if self.validation is not None and evaluated is not None and evaluated.counts is not None:
            examples, counts = self.validation.examples, evaluated.counts
            self.keeper.report(lambda folder: self.task.report(self.plain_model, examples, counts, folder))
        result = TrainResult(
            steps=state.step,
            train_loss=state.train_loss,
            eval_loss=None if evaluated is None else evaluated.loss,
            best_eval_loss=None if math.isinf(state.best) else state.best,
            seconds=time.perf_counter() - start,
            best_step=state.best_step or None,
            best_metric=None if math.isinf(state.best_metric) else state.best_metric,
            measured=measure(self.objectives, self.accelerator) if evaluated is None else evaluated.shown(),
        )
        self.keeper.finish(result)
        return result

    def _windows(self, epoch: int, first: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step, from step `first` of the epoch on."""
        size = self.config.gradient_accumulation_steps
        window: list[Batch] = []
        for batch in self.batches.epoch(epoch, first * size):
            window.append(batch)
            if len(window) == size:
                yield window
                window = []
        if window:
            yield window

    def _step(self, window: list[Batch]) -> dict[str, float]:
        accelerator, objectives, device = self.accelerator, self.objectives, self.accelerator.device
        processes = accelerator.num_processes
        counts = torch.tensor([self.task.predictions(b) for b in window], dtype=torch.float64, device=device)
        total = accelerator.reduce(counts.sum(), "sum").clamp(min=1)
        for objective in objectives:
            objective.reset()
            objective.begin(window, self.state.step, self.total, device)
        losses = [0.0] * (1 + len(objectives))
        for i, batch in enumerate(window):
            last = i + 1 == len(window)
            with accelerator.no_sync(self.model) if not last else nullcontext():
                with accelerator.autocast():
                    output = self.task.output(self.model, batch)
                # DistributedDataParallel averages gradients over processes; the world size undoes that.
                shares = [output.loss.float() * (counts[i] / total * processes).float()]
                shares += [objective.share(batch, output).to(shares[0].device) for objective in objectives]
                accelerator.backward(sum(shares[1:], shares[0]))
            losses = [sum_ + float(share.detach()) / processes for sum_, share in zip(losses, shares, strict=True)]
        loss, *extra = accelerator.reduce(torch.tensor(losses, device=device), "sum").tolist()
        if not math.isfinite(sum((loss, *extra))):
            raise Diverged(self.label, sum((loss, *extra)), self.state.step + 1)
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        for objective in objectives:
            objective.end(scale)
        if self.config.max_grad_norm:
            accelerator.clip_grad_norm_(self._parameters(), self.config.max_grad_norm)
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        of_objectives = {f"{each.measure}_loss": value for each, value in zip(objectives, extra, strict=True)}
        return {
            "loss": loss,
            "learning_rate": rate,
            **of_objectives,
            **numbers(measure(self.objectives, self.accelerator)),
        }

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # ------------------------------------------------------------------ evaluation

    def _evaluate_and_keep(self) -> Evaluated | None:
        """None where there is nothing to evaluate on."""
        if self.validation is None:
            return None
        state, by = self.state, self.config.best_by
        found = evaluate(self.model, self.validation, self.task, self.objectives, self.accelerator)
        self._log({"step": state.step, **found.logged()})
        metric = found.metrics.get(by, -math.inf)  # one that is not defined is none to be best by
        if metric > state.best_metric if by else found.loss < state.best:
            state.best, state.best_metric, state.best_step = found.loss, metric, state.step
            self.keeper.save("best")
        return found

    def _log(self, entry: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.folder.append_log(entry)
            self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=entry["step"])
