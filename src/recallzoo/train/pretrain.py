"""Pretrain one language model: one device, or many under torchrun.

    summary = pretrain(PretrainOptions(preset="attention-70m", data=DATA, out=OUT))

    OUT/
      pretrain.json     what is trained: model, data, order, schedule
      metrics.jsonl     one line a step: loss_nats, grad_norm, learning_rate, tokens_per_second, ...
      checkpoints/      the last ones, see `_large_checkpoint`
      model/            the finished model in Hugging Face form (recallzoo.hub)
      summary.json      written last: final losses, speed, memory, versions, everything left out

The data of a step is a function of (seed, step), the initial weights of the seed; so models with
equal context and global batch see equal data in equal order, and a run that was killed and
started again, also with another number of processes, goes on as if it had not been.
"""

import importlib.util
import json
import math
import os
import statistics
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from recallzoo.devices import SLOW_BFLOAT16, emulates_bfloat16, is_out_of_memory
from recallzoo.errors import RecallzooError, StoreError, UserError
from recallzoo.files import atomic_file, read_json, remove_leftovers, write_json
from recallzoo.interrupts import allow
from recallzoo.mixers import copy_sources, that_look_ahead
from recallzoo.options import fits
from recallzoo.provenance import environment
from recallzoo.text import open_data
from recallzoo.train import _large_model as large
from recallzoo.train._flops import flops_per_token, peak_flops
from recallzoo.train._large_checkpoint import (
    Checkpoints,
    empty_moments,
    finished_steps,
    training_state,
)
from recallzoo.train._pretrain_engine import Engine, first_micro_batch
from recallzoo.train._pretrain_log import (
    SUMMARY,
    Metrics,
    PretrainProgress,
    open_sinks,
    read_metrics,
)
from recallzoo.train._pretrain_options import PretrainOptions
from recallzoo.train._pretrain_plan import (
    Plan,
    alone,
    make_plan,
    open_run,
    with_recorded_mixer,
)
from recallzoo.train._pretrain_valid import Validation
from recallzoo.train._token_order import Batches, TokenOrder

UNTIMED_STEPS = 5
"""Steps whose speed is not counted: they compile and allocate."""
SAVING_SECONDS = 60.0
"""For the save under way when the run is interrupted."""
_SUMMARISED = {
    **dict.fromkeys(("status", "hash", "device", "compile"), str),
    **dict.fromkeys(("steps", "tokens"), int),
    **dict.fromkeys(
        ("train_loss_nats", "tokens_per_second", "mfu", "peak_memory_gib"), float | None
    ),
    "valid": dict | None,
    "notes": list,
}
"""What of a stored summary is read."""


def pretrain(options: PretrainOptions, plan: Plan | None = None) -> dict[str, Any]:
    """Train to the end, or as far as `stop_after_minutes`; returns the summary.

    plan   what `make_plan` made of these options before

    Raises UserError for options that contradict themselves, the data or what OUT holds;
    StoreError for damaged data or checkpoints and a disk that is full at the end; RecallzooError
    when the loss is no longer finite: the batch is saved and nothing is trained on it.
    """
    started = time.monotonic()
    plan = plan or make_plan(options)
    if (options.out / SUMMARY).exists():
        open_run(options.out, plan)
        return _finished(options, _read_summary(options.out / SUMMARY, plan))
    processes = large.join_processes(options.device)
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(processes.device)
    with ExitStack() as held:
        summary = _Run(options, plan, processes, started, held).train()
    processes.leave()
    return summary


def _read_summary(path: Path, plan: Plan) -> dict[str, Any]:
    wrong = "its JSON"
    with suppress(StoreError):  # whose advice is to delete the folder, checkpoints and all
        summary = read_json(path)
        wrong = _changed(summary, plan)
        if wrong is None:
            return summary
    raise StoreError(
        f"{path} was changed after it was written: {wrong} is not as it was. Delete the file and "
        f"run the same command: the last checkpoint gives it anew."
    )


def _changed(summary: Any, plan: Plan) -> str | None:
    """The first field of a stored summary that cannot be as it was written; None if all can."""
    if not isinstance(summary, dict):
        return "its JSON"
    for name, wanted in _SUMMARISED.items():
        if name not in summary or not fits(summary[name], wanted):
            return name
    for name, value in (("hash", plan.hash), ("steps", plan.num_steps)):
        if summary[name] != value:
            return name
    if summary["valid"] and not fits(summary["valid"].get("valid_loss_nats"), float):
        return "valid"
    return None


def _finished(options: PretrainOptions, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that is finished already; OUT/model is made if it is wanted now."""
    model = options.out / "model"
    if not options.export or model.exists() or int(os.environ.get("RANK", 0)):
        return summary
    if summary["steps"] not in finished_steps(options.out / "checkpoints"):
        note = f"no {model}: it is gone, and so is the checkpoint of step {summary['steps']:,}"
        return {**summary, "notes": [*summary["notes"], note]}
    _require_transformers()
    from recallzoo.train.exporting import export_run

    export_run(options.out, model, step=summary["steps"], data=options.data)
    return summary


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "writing OUT/model at the end needs transformers, which is not installed. Install "
            "it with `pip install 'recallzoo[text]'`, or leave it out with --no-export."
        )


class _Run:
    """One pretraining run in one process."""

    def __init__(
        self,
        options: PretrainOptions,
        plan: Plan,
        processes: large.Processes,
        started: float,
        held: ExitStack,
    ) -> None:
        self.options, self.processes = options, processes
        self._started = self._last_save = started
        self.progress = PretrainProgress(processes.is_first, options.log_seconds)
        micro_batch = first_micro_batch(options, plan, processes)
        if options.export:
            _require_transformers()
        if options.precision == "bf16" and emulates_bfloat16(processes.device):
            self.progress.warned(SLOW_BFLOAT16)
        if options.parallel != "auto" and processes.world_size == 1:
            self.progress.warned(
                f"--parallel {options.parallel} shares out nothing here: this is one process. "
                f"torchrun starts several"
            )
        if ahead := that_look_ahead(plan.preset.model.layer_mixers()):
            self.progress.warned(
                f"{', '.join(ahead)} looks ahead: losses of {plan.preset.name} are not comparable "
                f"with those of causal models"
            )
        sinks: list[Any] = []
        if processes.is_first:
            open_run(options.out, plan)
            held.enter_context(alone(options.out, self.progress.warned))
            remove_leftovers(options.out)
            copy_sources(plan.preset.model.mixers, options.out, use=True)
            if options.verify_data:
                open_data(options.data, verify=True)
            sinks = open_sinks(options.out, options.wandb, options.tensorboard, plan.config)
        processes.wait()
        if options.mixer is not None and not processes.is_first:
            plan = with_recorded_mixer(options, plan)
        self.plan = plan
        self.metrics = Metrics(options.out, sinks)

        try:
            self.engine = Engine(options, plan, processes, micro_batch, self.progress.warned)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            model = plan.preset.model
            raise UserError(
                f"{plan.preset.name} with width {model.d_model:,} and {model.num_layers:,} layers "
                f"does not fit into memory before it trains. Give a smaller --d-model or "
                f"--num-layers, or share it out over more GPUs with --parallel fsdp."
            ) from error
        self.checkpoints = Checkpoints(
            options.out / "checkpoints", processes, plan.hash, options.keep_checkpoints
        )
        self.validation = None
        if options.valid_every != 0:
            self.validation = Validation.prepare(
                plan.data, plan.context, options.valid_contexts, options.cut_rates, processes
            )
            if self.validation is None:
                self.progress.warned("no validation: the data has no validation split of a context")
            elif self.validation.note:
                self.progress.warned(self.validation.note)
        self.valid_every = options.valid_every or max(1, plan.num_steps // 20)
        self._flops, self._peak = self._count_flops()

    def train(self) -> dict[str, Any]:
        """All steps that are left."""
        plan, options = self.plan, self.options
        first = self._resume()
        order = TokenOrder(len(plan.contexts), options.seed, plan.global_batch)
        batches = Batches(
            plan.contexts,
            order,
            self.processes.rank,
            self.processes.world_size,
            pin_memory=self.processes.device.type == "cuda",
        )
        self.progress.start(first, plan.num_steps)
        step = first
        try:
            for tokens in batches.from_step(first, plan.num_steps):
                began = time.perf_counter()
                values, save, stop = self._step(step, tokens, order)
                step += 1
                self._report(step, values, time.perf_counter() - began)
                if step % self.valid_every == 0 or step == plan.num_steps:
                    self._validate(step)
                if save or stop or step == plan.num_steps:
                    self._save(step)
                if stop or step == plan.num_steps:
                    break  # a last save that fails is an error, however soon it does
                self._poll_save()
            self.checkpoints.finish()
        except KeyboardInterrupt:
            allow(SAVING_SECONDS)
            self._poll_save(wait=True)
            raise
        finally:
            self.progress.end()
        if step < plan.num_steps:
            self.progress.say(
                f"stopped after {options.stop_after_minutes:g} minutes at step {step} of "
                f"{plan.num_steps}; the same command goes on."
            )
            return self._summary(step, "stopped")
        return self._finish(step)

    def _step(
        self, step: int, tokens: Tensor, order: TokenOrder
    ) -> tuple[dict[str, float], bool, bool]:
        """Train on one step's contexts. Returns what to log, and whether to save and stop."""
        local, grad_norm = self.engine.gradients(step, tokens)
        bad = not (math.isfinite(local) and math.isfinite(grad_norm))
        loss, num_bad, save, stop = self.processes.summed(
            0.0 if bad else local,
            float(bad),
            float(self.processes.is_first and self._is_time_to_save(step + 1)),
            float(self.processes.is_first and self._is_time_to_stop()),
        )
        if num_bad:
            raise self._not_finite(step, order, local, grad_norm)
        values = {
            "loss_nats": loss / self.plan.tokens_per_step,
            "grad_norm": grad_norm,
            "learning_rate": self.engine.update(step),
        }
        return values, bool(save), bool(stop)

    def _report(self, step: int, values: dict[str, Any], seconds: float) -> None:
        rate = self.plan.tokens_per_step / seconds
        values["tokens_per_second"] = rate
        if self._flops is not None and self._peak is not None:
            values["mfu"] = self._flops * rate / (self._peak * self.processes.world_size)
        if self.processes.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.processes.device)
            values["peak_memory_gib"] = peak / 2**30
        if self.processes.is_first:
            tokens = step * self.plan.tokens_per_step
            self.metrics.write(step, {"tokens": tokens, "seconds": seconds, **values})
        self.progress.stepped(step, values)

    def _validate(self, step: int) -> None:
        if self.validation is None:
            return
        self.engine.module.eval()
        try:
            found = self._look(self.validation)
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) and self.engine.release()):
                raise
            found = None
        if found is None:  # beside what a captured micro-batch kept, memory did not suffice
            found = self._look(self.validation)
        large.end_evaluation(self.engine.module)
        if not math.isfinite(found["valid_loss_nats"]):
            self._poll_save(wait=True)
            raise RecallzooError(
                f"the validation loss is not finite at step {step} ({found['valid_loss_nats']}), "
                f"though the loss in training was. Checkpoints are kept. Try a lower "
                f"--learning-rate or a longer --warmup with another --out, or train without "
                f"looking there (--valid-every 0)."
            )
        if self.processes.is_first:
            self.metrics.write(step, found)
        self.progress.validated(step, found)

    def _look(self, validation: Validation) -> dict[str, Any]:
        with self.engine.autocast():
            return validation.look(self.engine.module, self.engine.micro_batch, self.processes)

    def _is_time_to_save(self, step: int) -> bool:
        if self.options.save_every is not None:
            return step % self.options.save_every == 0
        return time.monotonic() - self._last_save > 60 * self.options.save_minutes

    def _is_time_to_stop(self) -> bool:
        limit = self.options.stop_after_minutes
        return limit is not None and time.monotonic() - self._started > 60 * limit

    def _save(self, step: int) -> None:
        self._poll_save(wait=True)
        self.checkpoints.save(step, training_state(self.engine.model, self.engine.optimizer))
        self._last_save = time.monotonic()

    def _poll_save(self, wait: bool = False) -> None:
        """See what became of the save under way. One that failed is told, and training goes on
        from memory: the checkpoint before is still there."""
        try:
            if wait:
                self.checkpoints.finish()
            else:
                self.checkpoints.poll()
        except StoreError as error:
            self.progress.warned(str(error))

    def _resume(self) -> int:
        remove = self.processes.is_first and self.checkpoints.folder.exists()
        if remove:
            remove_leftovers(self.checkpoints.folder)
        self.processes.wait()
        step = self.checkpoints.latest()
        empty_moments(self.engine.optimizer, step or 0)
        if step is not None:
            self.checkpoints.load(step, training_state(self.engine.model, self.engine.optimizer))
            self.progress.say(f"going on from step {step} of {self.plan.num_steps}")
        if self.processes.is_first:
            self.metrics.start(step or 0)
        return step or 0

    def _not_finite(
        self, step: int, order: TokenOrder, loss: float, grad_norm: float
    ) -> RecallzooError:
        """Save the batch and say so."""
        self._poll_save(wait=True)
        path = self.options.out / f"not_finite-step-{step + 1:08d}.safetensors"
        if self.processes.is_first:
            numbers = torch.from_numpy(order.contexts_of(step))
            tokens = self.plan.contexts.batch(numbers.numpy()).tokens
            about = {"step": step + 1, "loss_nats": str(loss), "grad_norm": str(grad_norm)}
            with atomic_file(path) as temporary:
                save_file(
                    {"tokens": tokens, "contexts": numbers},
                    temporary,
                    {"about": json.dumps(about)},
                )
        return RecallzooError(
            f"the loss or its gradient is not finite at step {step + 1} (loss {loss}, gradient "
            f"norm {grad_norm}). Nothing was trained on this batch, which is saved as {path}. "
            f"Checkpoints are kept. Try a lower --learning-rate or a longer --warmup, with "
            f"another --out."
        )

    def _finish(self, step: int) -> dict[str, Any]:
        if self.options.export:
            weights = large.full_state(self.engine.model, self.engine.vocab_size)
            if self.processes.is_first:
                from recallzoo.hub import export

                export(
                    self.options.out / "model",
                    self.plan.preset.model,
                    weights,
                    vocab_size=self.engine.vocab_size,
                    context=self.plan.context,
                    tokenizer_folder=self.plan.data.tokenizer_folder,
                )
        summary = self._summary(step, "finished")
        if self.processes.is_first:
            write_json(self.options.out / SUMMARY, summary)
        self.processes.wait()
        return summary

    def _summary(self, step: int, status: str) -> dict[str, Any]:
        lines = read_metrics(self.options.out)
        steps = [line for line in lines if "loss_nats" in line]
        timed = steps[UNTIMED_STEPS:] or steps
        valid = [line for line in lines if "valid_loss_nats" in line]
        device = self.processes.device
        peaks = None
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            peaks = self.processes.gathered(peak)

        def median(name: str) -> float | None:
            return statistics.median(line[name] for line in timed) if name in timed[-1] else None

        return {
            "status": status,
            "hash": self.plan.hash,
            "preset": self.plan.preset.name,
            "parameters": self.engine.num_parameters,
            "steps": step,
            "tokens": step * self.plan.tokens_per_step,
            "train_loss_nats": steps[-1]["loss_nats"] if steps else None,
            "valid": valid[-1] if valid else None,
            "tokens_per_second": median("tokens_per_second") if timed else None,
            "mfu": median("mfu") if timed else None,
            "flops_per_token": self._flops,
            "peak_memory_gib": steps[-1].get("peak_memory_gib") if steps else None,
            "peak_memory_gib_by_process": peaks,
            "train_seconds": sum(line["seconds"] for line in steps),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "processes": self.processes.world_size,
            "parallel": large.way_to_spread(self.processes, self.options.parallel),
            "micro_batch": self.engine.micro_batch,
            "compile": self.engine.compiled,
            "cuda_graph": self.engine.captured,
            "checkpoint_activations": self.options.checkpoint_activations,
            "notes": self.progress.warnings,
            "provenance": environment(),
            "config": self.plan.config,
        }

    def _count_flops(self) -> tuple[float | None, float | None]:
        peak = peak_flops(self.processes.device)
        if self.processes.device.type == "cuda" and peak is None:
            name = torch.cuda.get_device_name(self.processes.device)
            self.progress.warned(f"no MFU: the peak speed of {name} is not known")
        try:
            model, vocab_size = self.plan.preset.model, self.engine.vocab_size
            return flops_per_token(model, vocab_size, self.plan.context), peak
        # Counting runs mixers on tensors without numbers, which one of a user's own may not bear.
        except Exception as error:  # noqa: BLE001
            self.progress.warned(f"no MFU: counting failed ({type(error).__name__}: {error})")
            return None, peak
