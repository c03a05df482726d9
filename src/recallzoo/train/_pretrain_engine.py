"""One step of pretraining on one process: gradients in micro-batches, clipping, AdamW."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from recallzoo.devices import is_out_of_memory
from recallzoo.errors import UserError
from recallzoo.model import LanguageModel
from recallzoo.random import seed_of
from recallzoo.train import _large_model as large
from recallzoo.train._copies import SharedGradients
from recallzoo.train._pretrain_options import PretrainOptions
from recallzoo.train._pretrain_plan import Plan
from recallzoo.train._replay import Replayed

AUTO_MICRO_TOKENS = {"cuda": 1 << 15, "cpu": 1 << 13}
"""Tokens of a micro-batch where none is given."""


def first_micro_batch(options: PretrainOptions, plan: Plan, processes: large.Processes) -> int:
    """Contexts that a process computes at a time, at first. UserError if what is given does not
    share the global batch evenly."""
    if plan.global_batch % processes.world_size:
        raise UserError(
            f"a global batch of {plan.global_batch} contexts cannot be shared evenly by "
            f"{processes.world_size} processes. Give a --global-batch that can."
        )
    share = plan.global_batch // processes.world_size
    given = options.micro_batch
    if given is not None:
        if share % given:
            raise UserError(
                f"--micro-batch {given} does not divide the {share} contexts that each process "
                f"has of a step."
            )
        return given
    most = max(1, AUTO_MICRO_TOKENS[processes.device.type] // plan.context)
    return max(size for size in range(1, min(most, share) + 1) if share % size == 0)


class Engine:
    """The model and its optimiser, spread over the processes of a run."""

    def __init__(
        self,
        options: PretrainOptions,
        plan: Plan,
        processes: large.Processes,
        micro_batch: int,
        warn: Callable[[str], None],
    ) -> None:
        self.options, self.plan, self.processes = options, plan, processes
        self.micro_batch = micro_batch
        self._warn = warn
        self._share = plan.global_batch // processes.world_size
        self.vocab_size = plan.data.vocab_size
        self.model: LanguageModel = large.build_model(
            plan.preset.model, self.vocab_size, plan.context, options.seed
        )
        self.num_parameters = self.model.num_parameters()
        self._hold = large.may_hold(self.num_parameters, processes.device)
        self._training = large.TrainingModel(self.model, self.vocab_size)
        self.compiled = self._compile()
        if options.checkpoint_activations:
            large.checkpoint_activations(self._training)
        rules = self.model.parameter_rules()
        self.module: nn.Module = large.spread(self._training, processes, options.parallel)
        self.optimizer = _adamw(self.model, rules, options, plan.learning_rate)
        self._loss_sum = torch.zeros((), device=processes.device)
        way = large.way_to_spread(processes, options.parallel)
        self._shared = SharedGradients(list(self.model.parameters())) if way == "ddp" else None
        # Shares are gathered and added up by hooks, which a captured pass would not call.
        captures = processes.device.type == "cuda" and way != "fsdp"
        self._replayed = Replayed(self._micro_step, warn) if captures else None

    def gradients(self, step: int, tokens: Int[Tensor, "B T1"]) -> tuple[float, float]:
        """Compute and clip the gradient of the mean loss over the global batch. Returns the sum of
        losses over this process's tokens, in nats, and the gradient's norm before clipping."""
        loss_sum = self._accumulate(step, tokens.to(self.processes.device, non_blocking=True))
        parameters = list(self.model.parameters())
        grads = [p.grad for p in parameters if p.grad is not None]
        norm: Any = nn.utils.get_total_norm(grads)
        if hasattr(norm, "full_tensor"):  # of shares: added up over processes once
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(parameters, self.options.max_grad_norm, norm)
        return float(loss_sum), float(norm)

    def update(self, step: int) -> float:
        """Move the weights along the gradient; returns the learning rate."""
        share = learning_rate_share(step, self.plan.num_steps, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.step()
        # A captured pass adds to the gradients that were there when it was captured.
        self._clear_gradients(keep=self._replayed is not None)
        return self.plan.learning_rate * share

    def _clear_gradients(self, *, keep: bool) -> None:
        """Make gradients zero, or leave none: copies' shared ones always stay."""
        if self._shared is not None:
            self._shared.clear()
        else:
            self.optimizer.zero_grad(set_to_none=not keep)

    @property
    def captured(self) -> bool:
        """Whether micro-batches have been replayed as a CUDA graph, to the end."""
        replayed = self._replayed
        return replayed is not None and replayed.has_captured and replayed.works

    def release(self) -> bool:
        """Give back the memory that a captured micro-batch keeps between steps; it is captured
        anew. False if there is none."""
        if self._replayed is None or not self._replayed.forget():
            return False
        torch.cuda.empty_cache()
        return True

    def autocast(self) -> torch.autocast:
        """The precision of matrix products."""
        enabled = self.options.precision == "bf16"
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _accumulate(self, step: int, tokens: Tensor) -> Tensor:
        """Gradients of the mean loss over the global batch; returns this process's loss sum."""
        while True:
            try:
                return self._backward(step, tokens)
            except large.compile_errors() as error:
                if self.compiled == "none":
                    raise
                self._warn(
                    f"compiling failed, training goes on without it: {str(error).splitlines()[0]}"
                )
                self.compiled = "none"
                large.undo_compiling(self._training)
                if self.options.checkpoint_activations:
                    large.checkpoint_activations(self._training)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.processes.world_size > 1 or self.micro_batch == 1:
                    raise large.out_of_memory_advice(self.micro_batch) from error
                before = self.micro_batch
                self.micro_batch = max(size for size in range(1, before) if self._share % size == 0)
                self._warn(
                    f"out of memory with micro-batches of {before} contexts; going on with "
                    f"{self.micro_batch}"
                )
            self._clear_gradients(keep=False)
            if self._replayed is not None:
                self._replayed.forget()
            if self.processes.device.type == "cuda":
                torch.cuda.empty_cache()

    def _backward(self, step: int, tokens: Tensor) -> Tensor:
        self._loss_sum.zero_()
        starts = range(0, self._share, self.micro_batch)
        first = self.processes.rank * self._share
        seeds = [seed_of(self.options.seed, "dropout", step, first + start) for start in starts]
        # All at once: each number brought to the device by itself would wait for its work so far.
        keys = torch.tensor(seeds, device=self.processes.device)
        large.set_hold(self.module, self._hold and len(starts) > 1)
        run = self._replayed or self._micro_step
        for start, key in zip(starts, keys, strict=True):
            is_last = start + self.micro_batch >= self._share
            large.set_gradient_sync(self.module, is_last, hold=self._hold)
            run(tokens[start : start + self.micro_batch], key)
        large.set_hold(self.module, False)
        if self._shared is not None:
            self._shared.average()
        return self._loss_sum

    def _micro_step(self, tokens: Tensor, key: Tensor) -> None:
        """Add the gradients and the loss of a micro-batch."""
        with self.autocast():
            loss = self.module(tokens, key)
        # Gradients are averaged over processes, so each takes the mean over its share.
        (loss / (self._share * self.plan.context)).backward()
        self._loss_sum += loss.detach()

    def _compile(self) -> str:
        what = self.options.compile
        if what == "auto":
            what = "blocks" if self.processes.device.type == "cuda" else "none"
        if self.processes.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if what != "none":
            large.compile_model(self._training, what)
        return what


def _adamw(
    model: LanguageModel, rules: dict[str, Any], options: PretrainOptions, learning_rate: float
) -> torch.optim.AdamW:
    groups: dict[tuple[bool, float | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rule = rules[name]
        groups.setdefault((rule.decay, rule.learning_rate), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": options.weight_decay if decay else 0.0,
                "peak": learning_rate if fixed is None else fixed,
            }
            for (decay, fixed), parameters in groups.items()
        ],
        lr=learning_rate,
        betas=(options.beta1, options.beta2),
        fused=True,
    )


def learning_rate_share(step: int, num_steps: int, options: PretrainOptions) -> float:
    """Share of the peak at step 0, 1, ..., num_steps - 1: linear warm-up, then a cosine."""
    warmup = math.ceil(options.warmup * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
    return options.final_learning_rate + (1 - options.final_learning_rate) * falling
