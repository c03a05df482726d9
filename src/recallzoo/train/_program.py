"""The program of a pack: one training step and one evaluation for R runs at once.

    losses[r] = mean cross-entropy at the query positions of run r's own batch
    gradients = d sum_r losses[r] / d parameters        (each run's own: losses are independent)

The model between embedding and head is mapped over runs by `vmap` and differentiated by PyTorch;
embedding and head, whose gradients are known, are computed for all runs by `_vocabulary`.

All state lives on the device and a step never asks the host for anything, so on CUDA the whole
step (drawing the batch, forward, backward, AdamW) is captured once and replayed.

A user's own mixer that cannot be mapped (it asks for values, say) is computed run by run, on a
stream for each run on CUDA, neither compiled nor captured; `fallbacks` says so.

Letters   R packed runs, B batch, T time, Q queries, V vocabulary, N examples.
"""

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap

from recallzoo.devices import SLOW_BFLOAT16, emulates_bfloat16, is_out_of_memory
from recallzoo.mixers import Context
from recallzoo.model import LanguageModel
from recallzoo.random import mix64, permutation, seed_of
from recallzoo.run import Run
from recallzoo.tasks import Batch
from recallzoo.train._adamw import PackedAdamW
from recallzoo.train._replay import capture, free_after_failure, not_captured
from recallzoo.train._stack import Stack, Tensors
from recallzoo.train._vocabulary import (
    add_gradient,
    look_up,
    loss_and_gradients,
    losses_and_words,
)

EMBEDDING = "embedding.tokens.weight"
HEAD = "head.weight"
EVALUATION_HIDDEN_BYTES = {"cpu": 2**26, "cuda": 2**31}
"""Most memory that the residual stream of one evaluation batch may take, over all runs."""


class _Trunk(nn.Module):
    """A model between embedding and head as a module's forward, which is what `functional_call`
    can call."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, vectors: Tensor, tokens: Tensor, positions: Tensor, dropout_key: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The hidden states at `positions`, and the sum of the mixers' auxiliary losses."""
        context = Context(tokens=tokens, dropout_key=dropout_key)
        hidden = self.model.mix(vectors, positions, context)
        zero = torch.zeros((), device=vectors.device)
        return hidden, sum(context.losses.values(), zero)


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
        self.fallbacks: list[str] = []
        self.compile_seconds = 0.0
        """Of the present program."""
        self.all_compile_seconds = 0.0
        self.stack = stack
        self.adamw = adamw
        self.device = device
        self.batch_size = runs[0].budget.batch_size
        self.num_batches = [len(segment) // self.batch_size for segment in train]
        self._train = train
        self.is_compiled = compiled
        self.is_mapped = True
        self._training = _Trunk(stack.skeleton)
        self._evaluating = _Trunk(copy.deepcopy(stack.skeleton).eval())
        self._dtype = torch.bfloat16 if runs[0].precision == "bf16" else torch.float32
        if self._dtype == torch.bfloat16 and emulates_bfloat16(device):
            self.fallbacks.append(SLOW_BFLOAT16)
        self._head = HEAD if HEAD in stack.parameters else EMBEDDING
        self._streams: list[torch.cuda.Stream] = []
        self._seeds = self._per_run([seed_of("dropout", run.seed) for run in runs])
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros(len(runs), device=device)
        self.first_bad_step = self._per_run([-1] * len(runs))
        self._cursor = torch.zeros((), dtype=torch.int64, device=device)
        self._orders = [
            torch.zeros(len(runs), n, self.batch_size, dtype=torch.int64, device=device)
            for n in self.num_batches
        ]
        if any(config.source_sha256 for config in runs[0].model.mixers):
            self._try_mapped()
        self._build()

    def _try_mapped(self) -> None:
        """Map a few examples over the runs, or, where that fails, say so and go on without."""
        data = self._train[0]
        index = torch.zeros(len(self.runs), 2, dtype=torch.int64, device=self.device)
        batch = (data.tokens[index], data.query_positions[index], data.answers[index])
        self._trunk = self._mapped_trunk
        try:
            self._losses_and_gradients(*batch, self._seeds)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.fallbacks.append(
                f"the runs of the pack were computed one by one, as the mixer cannot be mapped "
                f"over runs: {_reason(error)}"
            )
            self.is_mapped = self.is_compiled = False

    def _per_run(self, values: list[int]) -> Int[Tensor, "R"]:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _build(self) -> None:
        """(Re)make what depends on the number of runs."""
        trunk = self._mapped_trunk if self.is_mapped else self._looped_trunk
        self._trunk: Callable[..., tuple[Tensor, Tensor]] = trunk
        self._update: Callable[..., None] = self.adamw.update
        self._is_tried = False
        if self.is_compiled:
            # The compiler keeps a few programs for each function and then stops compiling it.
            torch._dynamo.reset()
            self._trunk = torch.compile(self._mapped_trunk, dynamic=False, fullgraph=True)
            self._update = torch.compile(self.adamw.update, dynamic=False)
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._captures = True

    def _try_compiled(self, *batch: Tensor) -> None:
        """Compile the step, or, where that fails, say so and go on without."""
        self._is_tried = True
        started = time.monotonic()
        try:
            self._losses_and_gradients(*batch)
        except Exception as error:  # whatever the compiler raises is the reason
            if is_out_of_memory(error):
                raise
            self.fallbacks.append(f"the training step was not compiled: {_reason(error)}")
            self._trunk, self._update = self._mapped_trunk, self.adamw.update
            self.is_compiled = False
        self.compile_seconds = time.monotonic() - started
        self.all_compile_seconds += self.compile_seconds

    def _mapped_trunk(
        self,
        parameters: Tensors,
        vectors: Float[Tensor, "R B T *C E"],
        tokens: Int[Tensor, "R B T *C"],
        positions: Int[Tensor, "R B Q"],
        dropout_keys: Int[Tensor, "R"],
    ) -> tuple[Float[Tensor, "R B Q D"], Float[Tensor, "R"]]:
        def of_run(parameters: Tensors, buffers: Tensors, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return functional_call(self._training, _named(parameters, buffers), inputs)

        with self._arithmetic():
            return vmap(of_run, randomness="different")(
                parameters, self.stack.buffers, vectors, tokens, positions, dropout_keys
            )

    def _looped_trunk(
        self,
        parameters: Tensors,
        vectors: Float[Tensor, "R B T *C E"],
        tokens: Int[Tensor, "R B T *C"],
        positions: Int[Tensor, "R B Q"],
        dropout_keys: Int[Tensor, "R"] | None,
    ) -> tuple[Float[Tensor, "R B Q D"], Float[Tensor, "R"]]:
        """`_mapped_trunk` run by run; in evaluation without keys."""
        module = self._evaluating if dropout_keys is None else self._training
        # Unbound at once: the gradient of each part alone would fill a tensor of all.
        by_run = {name: tensor.unbind() for name, tensor in parameters.items()}
        buffers = {name: tensor.unbind() for name, tensor in self.stack.buffers.items()}
        outputs = []
        with self._arithmetic():
            for run, run_vectors in enumerate(vectors.unbind()):
                own = _named(
                    {name: parts[run] for name, parts in by_run.items()},
                    {name: parts[run] for name, parts in buffers.items()},
                )
                key = None if dropout_keys is None else dropout_keys[run]
                inputs = (run_vectors, tokens[run], positions[run], key)
                with self._own_stream(run):
                    outputs.append(functional_call(module, own, inputs))
        self._join_streams()
        hidden, auxiliary = zip(*outputs, strict=True)
        return torch.stack(hidden), torch.stack(auxiliary)

    def _own_stream(self, run: int) -> contextlib.AbstractContextManager[object]:
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        while len(self._streams) <= run:
            self._streams.append(torch.cuda.Stream(self.device))
        self._streams[run].wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._streams[run])

    def _join_streams(self) -> None:
        for stream in self._streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def _arithmetic(self) -> contextlib.AbstractContextManager[object]:
        if self._dtype == torch.bfloat16:
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
        if self.device.type == "cuda" and self.is_mapped:
            self._replay(("train", segment), lambda: self._train_step(segment))
        else:
            self._train_step(segment)

    def _train_step(self, segment: int) -> None:
        index = self._orders[segment].index_select(1, self._cursor.view(1)).squeeze(1)
        data = self._train[segment]
        keys = mix64(self._seeds + self.step * 0x9E3779B97F4A7C1)
        batch = (data.tokens[index], data.query_positions[index], data.answers[index], keys)
        if self.is_compiled and not self._is_tried:
            self._try_compiled(*batch)
        losses, gradients = self._losses_and_gradients(*batch)
        self._update(self.stack.parameters, gradients, self.step)
        bad = ~torch.isfinite(losses) & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(bad, self.step, self.first_bad_step))
        self.loss_sum.add_(losses)
        self.step.add_(1)

    def _losses_and_gradients(
        self,
        tokens: Int[Tensor, "R B T *C"],
        positions: Int[Tensor, "R B Q"],
        answers: Int[Tensor, "R B Q"],
        dropout_keys: Int[Tensor, "R"],
    ) -> tuple[Float[Tensor, "R"], Tensors]:
        """Cross-entropy of each run, and the gradients of it plus the auxiliary losses."""
        weights = self.stack.parameters
        outside = {EMBEDDING, self._head}
        inside = {n: p.detach().requires_grad_() for n, p in weights.items() if n not in outside}
        vectors = look_up(weights[EMBEDDING], tokens, self._dtype).requires_grad_()
        hidden, auxiliary = self._trunk(inside, vectors, tokens, positions, dropout_keys)
        losses, d_hidden, d_head = loss_and_gradients(
            hidden.detach().flatten(1, 2), weights[self._head], answers.flatten(1)
        )
        outputs, given = [hidden], [d_hidden.view_as(hidden)]
        if auxiliary.requires_grad:
            outputs, given = [*outputs, auxiliary], [*given, torch.ones_like(auxiliary)]
        d_vectors, *rest = torch.autograd.grad(
            outputs, [vectors, *inside.values()], given, allow_unused=True, materialize_grads=True
        )
        gradients = dict(zip(inside, rest, strict=True)) | {self._head: d_head}
        if self._head != EMBEDDING:
            gradients[EMBEDDING] = torch.zeros_like(weights[EMBEDDING])
        add_gradient(tokens, d_vectors, gradients[EMBEDDING])
        return losses, gradients

    def _replay(self, key: Any, function: Callable[[], None]) -> None:
        """Run `function` through a CUDA graph, captured on first use, or, where that fails, say so
        and go on without. What lacks memory lacks it uncaptured too, and says it plainly there."""
        if key not in self._graphs and self._captures:
            state = {name: tensor.clone() for name, tensor in self._tensors().items()}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            try:
                self._graphs[key] = capture(function)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._captures = False
                reason = f"the training step {not_captured(error)}"
                if reason not in self.fallbacks:  # a smaller pack tries again
                    self.fallbacks.append(reason)
            if not self._captures:
                free_after_failure()
            self.load_state_dict(state)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            function()

    @torch.no_grad()
    def evaluate(
        self, batches: list[Batch]
    ) -> tuple[Float[Tensor, "R"], list[Bool[Tensor, "R _ _"]]]:
        """Mean loss of every run, and for each batch which queries it answers right."""
        loss_sum = torch.zeros(len(self.runs), dtype=torch.float64, device=self.device)
        correct, num_queries = [], 0
        for batch in batches:
            parts = []
            indices = torch.arange(len(batch), device=self.device)
            for rows in indices.split(self._rows_at_once(batch)):
                losses, right = self._evaluate(batch.rows(rows))
                loss_sum += losses.double().sum((1, 2))
                parts.append(right)
            correct.append(torch.cat(parts, dim=1))
            num_queries += batch.answers.numel()
        return loss_sum / num_queries, correct

    def _rows_at_once(self, batch: Batch) -> int:
        width, seq_len = self.stack.skeleton.config.d_model, batch.tokens.shape[1]
        row_bytes = 4 * len(self.runs) * seq_len * max(width, seq_len)
        return max(1, min(len(batch), EVALUATION_HIDDEN_BYTES[self.device.type] // row_bytes))

    def _evaluate(self, batch: Batch) -> tuple[Float[Tensor, "R B Q"], Bool[Tensor, "R B Q"]]:
        def of_run(parameters: Tensors, buffers: Tensors, vectors: Tensor) -> Tensor:
            inputs = (vectors, batch.tokens, batch.query_positions, None)
            return functional_call(self._evaluating, _named(parameters, buffers), inputs)[0]

        weights = self.stack.parameters
        tokens = batch.tokens.expand(len(self.runs), *batch.tokens.shape)
        vectors = look_up(weights[EMBEDDING], tokens, self._dtype)
        if self.is_mapped:
            with self._arithmetic():
                hidden = vmap(of_run)(weights, self.stack.buffers, vectors)
        else:
            asked = batch.query_positions.expand(len(self.runs), *batch.query_positions.shape)
            hidden, _ = self._looped_trunk(weights, vectors, tokens, asked, None)
        answers = batch.answers.expand(len(self.runs), *batch.answers.shape)
        losses, words = losses_and_words(
            hidden.flatten(1, 2), weights[self._head], answers.flatten(1)
        )
        return losses.view(answers.shape), words.view(answers.shape) == answers

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

    def state_dict(self, rows: list[int]) -> Tensors:
        """All that a checkpoint needs of the runs at `rows`, beside their configuration."""
        index = self._per_run(rows)
        state = self._tensors()
        return {name: t[index] if t.ndim else t for name, t in state.items()}

    def load_state_dict(self, state: Tensors) -> None:
        """Go on from a checkpoint of the same runs."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    def _tensors(self) -> Tensors:
        return {
            "step": self.step,
            "loss_sum": self.loss_sum,
            "first_bad_step": self.first_bad_step,
            **{f"parameters/{n}": t for n, t in self.stack.parameters.items()},
            **{f"first_moment/{n}": t for n, t in self.adamw.first_moment.items()},
            **{f"second_moment/{n}": t for n, t in self.adamw.second_moment.items()},
        }


def _reason(error: Exception) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _named(parameters: Tensors, buffers: Tensors) -> tuple[Tensors, Tensors]:
    """The names that a model's tensors have within `_Trunk`."""
    return (
        {f"model.{name}": tensor for name, tensor in parameters.items()},
        {f"model.{name}": tensor for name, tensor in buffers.items()},
    )
