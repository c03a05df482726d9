"""What recallzoo hands to `torch.compile` on a GPU, by name.

    python tests/gpu_code/programs.py NAME...

compiles these for a GPU without one and prints a line of JSON for each: how many Triton kernels
forward and backward have and the megabytes that each moves, the seconds that it took, and what was
raised. Names may be patterns (`pack/*`):

    pack/SETTING        the step of a pack of two runs whose model has this mixer
    pack-norms/SETTING  the same without state mixers, the norms in one pass with the additions
    draws               random numbers, dropout and randomly selected rows of two runs
    update              AdamW of a pack
    embedding           our own kernels of a pack's token vectors and their gradient, of one width
                        and precision for each count
    rows                FlexAttention of selected rows, forward and backward
    rows-valid          the same without gradients
    block/SETTING       a block as pretraining compiles it
    valid/SETTING       the same in validation
    preset/NAME/I       layer I of a preset, the first of its kind, at its own width
    model/NAME          all blocks of a preset in one graph
    cell/MIXER-T-D      a pack of a cell of Figure 2 between embedding and head: also its passes,
                        which are bytes over those of the residual stream, and the steps of the
                        program that have half of one or more. What a GPU waits for in small models
                        can so be counted before and after a change
    plain/MIXER-T-D     the same without the compiler: operators that launch kernels, and passes

    broken/...          what is refused, so that a test sees that it is

SETTING is a mixer's name and the number of its options: 0 for none, then `contract_options`.
Shapes are small; what a kernel computes, and how fast, only a GPU can tell.
"""

import dataclasses
import fnmatch
import functools
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import no_gpu
from no_gpu import Written, gpu_kernels, launched_kernels

if __name__ == "__main__":
    no_gpu.pretend()

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recallzoo.mixers import Context, MixerConfig, mixer, mixer_class, registry
from recallzoo.mixers._rows import attend_rows, gather_rows
from recallzoo.mixers._selectors import Random
from recallzoo.model import Block, LanguageModel, ModelConfig, StateMixer
from recallzoo.presets import preset
from recallzoo.presets import registry as presets
from recallzoo.random import mix64
from recallzoo.recipes import _figure2 as figure2
from recallzoo.recipes.figure2 import figure2 as figure2_runs
from recallzoo.run import Budget, Optimizer, Run
from recallzoo.tasks import Data, make_splits, task
from recallzoo.train import _large_model as large
from recallzoo.train import _vocabulary
from recallzoo.train._adamw import PackedAdamW
from recallzoo.train._program import EMBEDDING, Program
from recallzoo.train._stack import stack_models

GPU = torch.device("cuda", 0)
Kernels = list[Written]
WITHOUT_KERNEL = {"aten.detach.default", "aten._unsafe_view.default", "prim.device.default"}
BATCH_SIZE = 8
SEQ_LEN = 64
D_MODEL = 32
CELL, PLAIN, CELL_RUNS = "cell/", "plain/", 4
LONG_SEQ_LEN = 1024
"""Tokens at which attention to rows goes by FlexAttention."""


class CalledOperators(TorchDispatchMode):
    """Every operator that launches a kernel, and the bytes that it is given and gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and str(func) not in WITHOUT_KERNEL:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.moved.append((str(func), sum(t.numel() * t.element_size() for t in tensors)))
        return result


def all_programs() -> dict[str, Callable[[], Kernels]]:
    """Every program by name, to be called where tensors have no memory."""
    programs: dict[str, Callable[[], Kernels]] = {
        "draws": _draws,
        "update": _update,
        "embedding": _embedding,
        "rows": functools.partial(_rows, training=True),
        "rows-valid": functools.partial(_rows, training=False),
        "broken/addresses": _broken_addresses,
        "broken/no-kernel": _without_kernel,
    }
    for name, config in settings().items():
        if getattr(mixer_class(config.name), "causal", True):  # others are refused on recall tasks
            programs[f"pack/{name}"] = functools.partial(_pack, config, "none")
            programs[f"pack-norms/{name}"] = functools.partial(_pack, config, "identity")
        for form in ("block", "valid"):
            programs[f"{form}/{name}"] = functools.partial(_block, config, form == "block")
    for name in presets:
        for layer in _kinds(preset(name).model):
            programs[f"preset/{name}/{layer}"] = functools.partial(_preset_layer, name, layer)
        programs[f"model/{name}"] = functools.partial(_preset_model, name)
    for name, seq_len, width in itertools.product(figure2.MIXERS, figure2.SEQ_LENS, figure2.WIDTHS):
        cell = functools.partial(_cell, name, seq_len, width)
        programs[f"{CELL}{name}-{seq_len}-{width}"] = cell
        plain = functools.partial(_plain_cell, name, seq_len, width)
        programs[f"{PLAIN}{name}-{seq_len}-{width}"] = plain
    return programs


def settings() -> dict[str, MixerConfig]:
    """Every mixer under its defaults and its other settings."""
    return {
        f"{name}/{number}": mixer(name, **options)
        for name, cls in registry.items()
        for number, options in enumerate(({}, *cls.contract_options))
    }


def _kinds(config: ModelConfig) -> Iterator[int]:
    """The first layer of each kind."""
    seen: set[MixerConfig] = set()
    for layer, config_of_layer in enumerate(config.layer_mixers()):
        if config_of_layer not in seen:
            seen.add(config_of_layer)
            yield layer


def on_gpu(tensor: Tensor) -> Tensor:
    """A tensor of the same shape on the GPU."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)


def move(module: nn.Module) -> None:
    """A module's parameters and buffers on the GPU, shared ones shared."""
    moved: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in moved:
                    there = on_gpu(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[tensor] = nn.Parameter(there) if is_parameter else there
                tensors[name] = moved[tensor]  # pyright: ignore[reportArgumentType]


def _pack(config: MixerConfig, state_mixer: StateMixer) -> Kernels:
    return _trunk(_program(config, state_mixer))


def _program(config: MixerConfig, state_mixer: StateMixer) -> Program:
    """A pack of two runs of one layer's kind."""
    model = ModelConfig(
        mixers=(config,),
        d_model=D_MODEL,
        state_mixer=state_mixer,
        position="learned",
        embed_dropout=0.1,
        residual_dropout=0.1 if state_mixer == "none" else 0.0,
    )
    run = Run(
        model=model,
        data=Data.of(task("mqar", seq_len=SEQ_LEN, num_pairs=4, vocab_size=128), 16, 16, 16),
        optimizer=Optimizer(max_grad_norm=1.0),
        budget=Budget(batch_size=BATCH_SIZE),
        precision="bf16",
    )
    return _on_gpu(run, 2)


def _cell(name: str, seq_len: int, width: int) -> Kernels:
    """A pack of CELL_RUNS runs as the recipe has them."""
    return _trunk(_cell_program(name, seq_len, width))


def _plain_cell(name: str, seq_len: int, width: int) -> Kernels:
    """What the operators of the same pack move, as they are called one by one."""
    program = _cell_program(name, seq_len, width)
    inside, vectors, *rest = _trunk_inputs(program)
    with CalledOperators() as forward:
        hidden, _ = program._mapped_trunk(inside, vectors, *rest)
    d_hidden, inputs = torch.empty_like(hidden), [vectors, *inside.values()]
    with CalledOperators() as backward:
        torch.autograd.grad([hidden], inputs, [d_hidden], allow_unused=True, materialize_grads=True)
    return [Written({}, forward.moved), Written({}, backward.moved)]


def _cell_program(name: str, seq_len: int, width: int) -> Program:
    (run, *_) = figure2_runs(
        mixers=(name,), seq_lens=(seq_len,), widths=(width,), num_examples=2048, seeds=(0,)
    )
    return _on_gpu(run, CELL_RUNS)


def _on_gpu(run: Run, num_runs: int) -> Program:
    """A pack, built as the trainer builds it and then moved to the GPU."""
    runs = [dataclasses.replace(run, seed=seed) for seed in range(num_runs)]
    with unset_fake_temporarily():
        train = make_splits(run.data, torch.device("cpu"))["train"]
        stack = stack_models(runs, torch.device("cpu"))
        adamw = PackedAdamW(runs, stack.parameters, stack.rules, num_steps=100, steps_per_epoch=10)
        program = Program(runs, stack, adamw, train, torch.device("cpu"), compiled=False)
    for tensors in (stack.parameters, stack.buffers, adamw.first_moment, adamw.second_moment):
        tensors.update({name: on_gpu(tensor) for name, tensor in tensors.items()})
    for part, name in ((adamw, "learning_rate"), (adamw, "weight_decay"), (program, "step")):
        setattr(part, name, on_gpu(getattr(part, name)))
    program.device = GPU
    return program


def _trunk(program: Program) -> Kernels:
    """What a pack compiles between embedding and head."""
    return gpu_kernels(program._mapped_trunk, *_trunk_inputs(program))


def _trunk_inputs(program: Program) -> tuple[Any, ...]:
    """Parameters, vectors, tokens, query positions and dropout keys."""
    inside = {n: p for n, p in program.stack.parameters.items() if n != EMBEDDING}
    for parameter in inside.values():
        parameter.requires_grad_()
    (run, *_) = program.runs
    shape = (len(program.runs), run.budget.batch_size, run.data.max_seq_len)
    width = run.model.d_model
    vectors = torch.empty(*shape, width, dtype=torch.bfloat16, device=GPU, requires_grad=True)
    tokens = torch.empty(shape, dtype=torch.int64, device=GPU)
    (split,) = run.data.train
    num_queries = split.task.num_queries
    positions = torch.empty(*shape[:2], num_queries, dtype=torch.int64, device=GPU)
    keys = torch.empty(shape[0], dtype=torch.int64, device=GPU)
    return inside, vectors, tokens, positions, keys


def _passes(name: str, programs: Kernels) -> dict[str, Any]:
    """Bytes of a cell's programs as passes over the residual stream of a run."""
    seq_len, width = map(int, name.split("-")[-2:])
    one = figure2.BATCH_SIZES[seq_len] * seq_len * width * 2 * CELL_RUNS
    steps = [
        [(round(amount / one, 1), what) for what, amount in program.moved] for program in programs
    ]
    return {
        "passes": [round(program.num_bytes / one, 1) for program in programs],
        "steps": [[step for step in program if step[0] >= 0.5] for program in steps],
    }


def _update() -> Kernels:
    program = _program(mixer("attention"), "none")
    parameters = program.stack.parameters
    gradients = {name: torch.empty_like(p) for name, p in parameters.items()}
    return gpu_kernels(program.adamw.update, parameters, gradients, program.step)


def _embedding() -> Kernels:
    def both(weight: Tensor, tokens: Tensor, dtype: torch.dtype) -> None:
        vectors = _vocabulary.look_up(weight, tokens, dtype)
        _vocabulary.add_gradient(tokens, vectors, weight)

    tokens = torch.empty(2, BATCH_SIZE, LONG_SEQ_LEN, dtype=torch.int64, device=GPU)
    return [
        Written(launched_kernels(both, torch.empty(2, 8192, width, device=GPU), tokens, dtype), [])
        for width in (48, 64, 512)
        for dtype in (torch.bfloat16, torch.float32)
    ]


def _draws() -> Kernels:
    selector = Random(rate=0.1, seed=0)

    def of_run(x: Tensor, tokens: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context = Context(tokens, key)
        return context.dropout(x, 0.1), context.uniform(x), selector(x, context).rows

    shape = (2, BATCH_SIZE, LONG_SEQ_LEN)
    x = torch.empty(*shape, D_MODEL, dtype=torch.bfloat16, device=GPU, requires_grad=True)
    tokens = torch.empty(shape, dtype=torch.int64, device=GPU)
    keys = torch.empty(2, dtype=torch.int64, device=GPU)
    return gpu_kernels(vmap(of_run, randomness="different"), x, tokens, keys)


def _rows(training: bool) -> Kernels:
    """Keys and values of one projection, as a mixer has them."""

    def attended(q: Tensor, kv: Tensor, rows: Tensor) -> Tensor:
        positions, valid = gather_rows(rows, LONG_SEQ_LEN)
        k, v = kv.chunk(2, dim=-1)
        return attend_rows(q, k, v, positions, valid, Context(), form="flex")

    shape = (BATCH_SIZE, 2, LONG_SEQ_LEN)
    q, kv = (
        torch.empty(*shape, width, dtype=torch.bfloat16, device=GPU, requires_grad=training)
        for width in (64, 128)
    )
    return gpu_kernels(attended, q, kv, torch.empty(shape[::2], dtype=torch.bool, device=GPU))


def _broken_addresses() -> Kernels:
    """Constants of 64 bits times and added to positions, which Inductor takes for addresses."""

    def hashed(tokens: Tensor) -> Tensor:
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return mix64(mix64(position * -7046029254386353131 + 8314820082290492691) + tokens)

    return gpu_kernels(hashed, torch.empty(4, LONG_SEQ_LEN, dtype=torch.int64, device=GPU))


def _without_kernel() -> Kernels:
    """A product, which is a library's."""
    x = torch.empty(64, 64, device=GPU)
    return gpu_kernels(torch.mm, x, x)


def _model(config: ModelConfig, seq_len: int) -> LanguageModel:
    with unset_fake_temporarily():
        model = large.build_model(config, 128, seq_len, seed=0)
    move(model)
    return model


def _compiled_layer(config: ModelConfig, layer: int, seq_len: int, *, training: bool) -> Kernels:
    """One block, as `compile_model` has it compiled."""
    config = dataclasses.replace(config, num_layers=1, mixers=(config.layer_mixers()[layer],))
    block = _model(config, seq_len).blocks[0]
    assert isinstance(block, Block)
    x, context = _inputs(seq_len, config.d_model, training)
    with torch.autocast("cuda", dtype=torch.bfloat16), torch.set_grad_enabled(training):
        return gpu_kernels(block.train(training).forward, x, context)


def _inputs(seq_len: int, width: int, training: bool) -> tuple[Tensor, Context]:
    shape = (BATCH_SIZE, seq_len)
    x = torch.empty(*shape, width, dtype=torch.bfloat16, device=GPU, requires_grad=training)
    tokens = torch.empty(shape, dtype=torch.int64, device=GPU)
    key = torch.empty((), dtype=torch.int64, device=GPU) if training else None
    return x, Context(tokens=tokens, dropout_key=key)


def _block(config: MixerConfig, training: bool) -> Kernels:
    model = ModelConfig(mixers=(config,), num_layers=1, d_model=D_MODEL, norm="rms")
    return _compiled_layer(model, 0, LONG_SEQ_LEN, training=training)


def _preset_layer(name: str, layer: int) -> Kernels:
    return _compiled_layer(preset(name).model, layer, LONG_SEQ_LEN, training=True)


def _preset_model(name: str) -> Kernels:
    config = preset(name).model
    model = _model(config, LONG_SEQ_LEN)
    x, context = _inputs(LONG_SEQ_LEN, config.d_model, training=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return gpu_kernels(lambda x, context: model.mix(x, None, context), x, context)


def main(patterns: list[str]) -> int:
    """A line of JSON a program; 1 if one does not compile."""
    programs = all_programs()
    names = list(dict.fromkeys(n for p in patterns for n in fnmatch.filter(programs, p)))
    if not names:
        sys.exit(f"no program is called {' or '.join(patterns)}. Known are: {', '.join(programs)}")
    failed = False
    for name in names:
        started, line = time.process_time(), {"name": name}
        try:
            with FakeTensorMode():
                kernels = programs[name]()
            line |= {
                "kernels": [len(program.kernels) for program in kernels],
                "megabytes": [round(program.num_bytes / 1e6, 2) for program in kernels],
            }
            if name.startswith((CELL, PLAIN)):
                line |= _passes(name, kernels)
            if name.startswith(PLAIN):
                line["operators"] = [len(program.moved) for program in kernels]
        except Exception as error:  # noqa: BLE001 (whatever a compiler raises is to be told)
            failed = True
            line |= {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        print(json.dumps(line | {"seconds": time.process_time() - started}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
