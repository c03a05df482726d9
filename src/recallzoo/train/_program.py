"""The program of a pack: one training step and one evaluation for R runs at once.

    losses[r] = mean cross-entropy at the query positions of run r's own batch
    gradients = d sum_r losses[r] / d parameters        (each run's own: losses are independent)

All state lives on the device and a step never asks the host for anything, so on CUDA the whole
step (drawing the batch, forward, backward, AdamW) is captured once and replayed.

Letters   R packed runs, B batch, T time, Q queries, V vocabulary, N examples.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap

from recallzoo.random import mix64, permutation, seed_of
from recallzoo.run import Run
from recallzoo.tasks import Batch
from recallzoo.train._adamw import PackedAdamW
from recallzoo.train._stack import Stack, Tensors

EVALUATION_LOGIT_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Most memory that the logits of one evaluation batch may take."""


class _Loss(nn.Module):
    """The loss as a module's forward, which is what `functional_call` can call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        loss: Callable[..., Tensor] = self.model.loss  # pyright: ignore[reportAssignmentType]
        return loss(*inputs)


class Program:
    """Training and evaluation of a stack of models on data that lie on one device."""

    def __init__(
        self,
        runs: list[Run],
        stack: Stack,
        adamw: PackedAdamW,
        train: list[Batch],
        device: torch.device,
        *,
        compiled: bool,
    ) -> None:
        self.runs = runs
        self.stack = stack
        self.adamw = adamw
        self.device = device
        self.batch_size = runs[0].budget.batch_size
        self.num_batches = [len(segment) // self.batch_size for segment in train]
        self._train = train
        self._compiled = compiled
        self._loss = _Loss(stack.skeleton)
        self._evaluating = copy.deepcopy(stack.skeleton).eval()
        self._seeds = self._per_run([seed_of("dropout", run.seed) for run in runs])
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros(len(runs), device=device)
        self.first_bad_step = self._per_run([-1] * len(runs))
        self._cursor = torch.zeros((), dtype=torch.int64, device=device)
        self._orders = [
            torch.zeros(len(runs), n, self.batch_size, dtype=torch.int64, device=device)
            for n in self.num_batches
        ]
        self._build()

    def _per_run(self, values: list[int]) -> Int[Tensor, "R"]:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _build(self) -> None:
        """(Re)make what depends on the number of runs."""
        self._losses: Callable[..., Tensor] = (
            torch.compile(self._losses_of, dynamic=False) if self._compiled else self._losses_of
        )
        self._update: Callable[..., None] = (
            torch.compile(self.adamw.update, dynamic=False) if self._compiled else self.adamw.update
        )
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}

    def _losses_of(
        self,
        parameters: Tensors,
        tokens: Int[Tensor, "R B T *C"],
        query_positions: Int[Tensor, "R B Q"],
        answers: Int[Tensor, "R B Q"],
        dropout_keys: Int[Tensor, "R"],
    ) -> Float[Tensor, "R"]:
        def loss_of_run(parameters, buffers, *inputs):
            return functional_call(
                self._loss,
                (
                    {f"model.{n}": p for n, p in parameters.items()},
                    {f"model.{n}": b for n, b in buffers.items()},
                ),
                inputs,
            )

        with self._arithmetic():
            return vmap(loss_of_run, randomness="different")(
                parameters, self.stack.buffers, tokens, query_positions, answers, dropout_keys
            )

    def _arithmetic(self) -> contextlib.AbstractContextManager[object]:
        if self.runs[0].precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def start_epoch(self, epoch: int) -> list[int]:
        """Shuffle the examples anew for every run, and return the order of segments to train
        on, one entry a step. Segments are shuffled alike for all runs: a step has one shape."""
        for segment, (order, batches) in enumerate(
            zip(self._orders, self.num_batches, strict=True)
        ):
            num_examples = len(self._train[segment])
            shuffled = [
                permutation(num_examples, "order", run.seed, segment, epoch, device=self.device)
                for run in self.runs
            ]
            used = torch.stack(shuffled)[:, : batches * self.batch_size]
            order.copy_(used.view_as(order))
        segments = torch.repeat_interleave(
            torch.arange(len(self._train)), torch.tensor(self.num_batches)
        )
        mixed = permutation(len(segments), "segments", self.runs[0].data.seed, epoch)
        return segments[mixed].tolist()

    def train_step(self, segment: int, batch: int) -> None:
        """One step on batch number `batch` of this epoch's order of a segment."""
        self._cursor.fill_(batch)
        if self.device.type == "cuda":
            self._replay(("train", segment), lambda: self._train_step(segment))
        else:
            self._train_step(segment)

    def _train_step(self, segment: int) -> None:
        index = self._orders[segment].index_select(1, self._cursor.view(1)).squeeze(1)
        data = self._train[segment]
        keys = mix64(self._seeds + self.step * 0x9E3779B97F4A7C1)
        parameters = {n: p.detach().requires_grad_() for n, p in self.stack.parameters.items()}
        losses = self._losses(
            parameters, data.tokens[index], data.query_positions[index], data.answers[index], keys
        )
        gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        given = {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), gradients, strict=True)
        }
        self._update(self.stack.parameters, given, self.step)
        losses = losses.detach()
        bad = ~torch.isfinite(losses) & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(bad, self.step, self.first_bad_step))
        self.loss_sum.add_(losses)
        self.step.add_(1)

    def _replay(self, key: Any, function: Callable[[], None]) -> None:
        """Run `function` through a CUDA graph, captured on first use."""
        if key not in self._graphs:
            state = [t.clone() for t in self._state()]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            self._graphs[key] = graph
            for tensor, saved in zip(self._state(), state, strict=True):
                tensor.copy_(saved)
        self._graphs[key].replay()

    def _state(self) -> list[Tensor]:
        """Everything that a step changes."""
        return [
            self.step,
            self.loss_sum,
            self.first_bad_step,
            *self.stack.parameters.values(),
            *self.adamw.first_moment.values(),
            *self.adamw.second_moment.values(),
        ]

    @torch.no_grad()
    def evaluate(
        self, batches: list[Batch]
    ) -> tuple[Float[Tensor, "R"], list[Bool[Tensor, "R N Q"]]]:
        """Mean loss of every run, and for each batch which queries it answers right."""
        loss_sum = torch.zeros(len(self.runs), dtype=torch.float64, device=self.device)
        correct, num_queries = [], 0
        for batch in batches:
            parts = []
            for rows in torch.arange(len(batch), device=self.device).split(
                self._rows_at_once(batch)
            ):
                loss, right = self._evaluate(batch.rows(rows))
                loss_sum += loss.double()
                parts.append(right)
            correct.append(torch.cat(parts, dim=1))
            num_queries += batch.answers.numel()
        return loss_sum / num_queries, correct

    def _rows_at_once(self, batch: Batch) -> int:
        vocab_size = self.runs[0].data.vocab_size
        row_bytes = 4 * len(self.runs) * batch.answers.shape[1] * vocab_size
        return max(1, min(len(batch), EVALUATION_LOGIT_BYTES[self.device.type] // row_bytes))

    def _evaluate(self, batch: Batch) -> tuple[Float[Tensor, "R"], Bool[Tensor, "R B Q"]]:
        def of_run(parameters, buffers):
            inputs = (batch.tokens, batch.query_positions)
            logits = functional_call(self._evaluating, (parameters, buffers), inputs).float()
            loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), reduction="sum")
            return loss, logits.argmax(-1) == batch.answers

        with self._arithmetic():
            return vmap(of_run)(self.stack.parameters, self.stack.buffers)

    def keep(self, positions: list[int]) -> None:
        """Drop all runs but those at `positions`."""
        index = self._per_run(positions)
        self.runs = [self.runs[i] for i in positions]
        for tensors in (self.stack.parameters, self.stack.buffers):
            for name in tensors:
                tensors[name] = tensors[name][index]
        self.adamw.keep(index)
        self._seeds = self._seeds[index]
        self.loss_sum = self.loss_sum[index]
        self.first_bad_step = self.first_bad_step[index]
        self._orders = [order[index] for order in self._orders]
        self._build()

    def state_dict(self) -> Tensors:
        """All that a checkpoint needs beside the runs' configuration."""
        return {
            "step": self.step,
            "loss_sum": self.loss_sum,
            "first_bad_step": self.first_bad_step,
            **{f"parameters/{n}": t for n, t in self.stack.parameters.items()},
            **{f"first_moment/{n}": t for n, t in self.adamw.first_moment.items()},
            **{f"second_moment/{n}": t for n, t in self.adamw.second_moment.items()},
        }

    def load_state_dict(self, state: Tensors) -> None:
        """Go on from a checkpoint of the same runs."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
