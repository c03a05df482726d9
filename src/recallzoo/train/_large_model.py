"""A language model made ready for pretraining: padded, compiled, spread over processes."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import checkpoint

from recallzoo.errors import RecallzooError, UserError
from recallzoo.mixers import Context, product_dtype
from recallzoo.model import Block, LanguageModel, ModelConfig
from recallzoo.random import seed_of
from recallzoo.train._copies import make_equal
from recallzoo.train._head_loss import head_loss, token_losses

TIMEOUT = timedelta(minutes=30)
"""Most that processes wait for one another; NCCL's own 10 minutes are short for compiling."""
HELD_SHARE = 0.25
"""Share of a GPU's memory that whole weights and gradients may take with --parallel fsdp."""
VOCAB_MULTIPLE = 64
"""The head gets rows up to a multiple of this, for the speed of its products."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which this one is."""

    rank: int
    world_size: int
    device: torch.device
    joined_here: bool = False
    """Whether `join_processes` made the group, so that `leave` ends it."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def summed(self, *values: float) -> list[float]:
        """Each value added up over all processes."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """End the group, if `join_processes` made it. A step of all processes: where one has
        failed, the others may wait for it in the middle of a step, and it would wait for them."""
        if self.joined_here:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            dist.barrier()


def join_processes(device: str) -> Processes:
    """Join the other processes if started by torchrun. UserError for a device that is absent."""
    kind = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not known. Wanted: auto, cpu or cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda was asked for, but PyTorch sees no CUDA device here. Use --device cpu, "
            "or see `recallzoo doctor`."
        )
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if kind == "cpu":
        place = torch.device("cpu")
    elif local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU: there are "
            f"{torch.cuda.device_count()}. Start torchrun with --nproc-per-node of that number."
        )
    else:
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    join = world_size > 1 and not dist.is_initialized()
    if join:
        # Waiting for all goes through gloo, so that nothing that one process does alone (reading
        # all data, writing the model) keeps a GPU of the others busy.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        store, rank, world_size = next(rendezvous("env://", rank, world_size, timeout=TIMEOUT))
        # torchrun keeps its store when it starts the processes anew (--max-restarts): the addresses
        # of those that ended must not be found there.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            store=PrefixStore(f"recallzoo-attempt-{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
    return Processes(rank, world_size, place, joined_here=join)


def padded(vocab_size: int) -> int:
    """Rows of the embedding and head for a vocabulary."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def build_model(config: ModelConfig, vocab_size: int, context: int, seed: int) -> LanguageModel:
    """The initial model of a seed: drawn on the CPU, so equal for every device and number of
    processes. The caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "initial weights"))
        return LanguageModel(config, vocab_size=padded(vocab_size), max_seq_len=context)


class TrainingModel(nn.Module):
    """Tokens in, loss out."""

    def __init__(self, model: LanguageModel, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size

    def forward(
        self,
        tokens: Int[Tensor, "B T1"],
        dropout_key: Int[Tensor, ""] | None = None,
        by_token: bool = False,
    ) -> Float[Tensor, ""] | Float[Tensor, "B T"]:
        """Loss in nats of each token but a row's first: their sum, or without gradient each.

        In training (with a key) the sum's gradient is that of the mixers' auxiliary losses as
        well, each times the number of tokens; its value is the cross-entropy alone.
        """
        inputs, answers = tokens[:, :-1], tokens[:, 1:].reshape(-1)
        context = Context(tokens=inputs, dropout_key=dropout_key)
        vectors = self.model.embedding.tokens(inputs)
        # The residual stream is in the precision of products: half the memory traffic between them.
        vectors = vectors.to(product_dtype(vectors))
        x = self.model.mix(vectors, None, context).flatten(0, 1)
        weight = self.model.embedding.tokens.weight
        if self.model.head is not None:
            weight = self.model.head.weight
        if by_token:
            return token_losses(x, weight, answers, self.vocab_size).view(inputs.shape)
        loss = head_loss(x, weight, answers, self.vocab_size)
        for auxiliary in context.losses.values():
            loss = loss + (auxiliary - auxiliary.detach()) * answers.numel()
        return loss


def compile_model(training: TrainingModel, what: str) -> None:
    """Compile each block, or all of them as one graph ("blocks", "model")."""
    import torch._dynamo

    # A hybrid has a graph for each kind of block, in training and in validation.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    if what == "model":
        model = training.model
        model.mix = torch.compile(model.mix, dynamic=False)  # pyright: ignore
        return
    for block in training.model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def undo_compiling(training: TrainingModel) -> None:
    """Back to plain PyTorch, for a compiler that fails."""
    training.model.__dict__.pop("mix", None)
    for block in training.model.blocks:
        block.__dict__.pop("forward", None)


def checkpoint_activations(training: TrainingModel) -> None:
    """Keep each block's input alone and compute the rest again when gradients need it."""
    for block in training.model.blocks:
        assert isinstance(block, Block)
        block.forward = functools.partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable[..., Tensor], x: Tensor, context: Context) -> Tensor:
    """A block's `forward`, computed again where gradients need it: with the random numbers of the
    first time, which follow from the context's state before it."""
    before = context.copy()

    def run(x: Tensor, context: Context) -> Tensor:
        # Not told apart by a flag that the first run sets: traced, this must change nothing.
        return forward(x, context if context.is_as(before) else before.copy())

    # The numbers are a function of a key, so no generator's state need be kept.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(run, x, context, **options)  # pyright: ignore[reportReturnType]


def way_to_spread(processes: Processes, parallel: str) -> str:
    """What --parallel comes to: ddp, fsdp or "one process"."""
    if processes.world_size == 1:
        return "one process"
    return "ddp" if parallel == "auto" else parallel


def spread(training: TrainingModel, processes: Processes, parallel: str) -> nn.Module:
    """The model on its device, as one of several copies (ddp) or shares (fsdp)."""
    way = way_to_spread(processes, parallel)
    if way == "one process":
        return training.to(processes.device)
    if way == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        training.to(processes.device)
        mesh = init_device_mesh(processes.device.type, (processes.world_size,))
        # Weights are gathered in float32 and cast by autocast, as in one process: mixers read
        # some of theirs in float32, which a cast while gathering would have rounded.
        for block in training.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(training, mesh=mesh)
        return training
    training.to(processes.device)
    make_equal(training)
    return training


def may_hold(num_parameters: int, device: torch.device) -> bool:
    """Whether a GPU may hold all weights and gradients whole (float32) between micro-batches: if
    they are at most HELD_SHARE of its memory."""
    if device.type != "cuda":
        return True
    memory = torch.cuda.get_device_properties(device).total_memory
    return 2 * 4 * num_parameters <= HELD_SHARE * memory


def set_gradient_sync(module: nn.Module, is_last: bool, *, hold: bool) -> None:
    """Prepare shares for a micro-batch, the last of a step or an earlier one.

    Shares that `hold` add gradients up over processes in the last one's backward pass, and their
    weights are gathered once a step and stay whole until then; others gather weights and share
    out gradients in every micro-batch, which takes the least memory.
    """
    if hasattr(module, "set_requires_gradient_sync"):
        sharded: Any = module
        sharded.set_requires_gradient_sync(is_last or not hold)
        sharded.set_reshard_after_backward(is_last or not hold)


def set_hold(module: nn.Module, hold: bool) -> None:
    """Whether the blocks' gathered weights stay whole after a forward pass. Evaluation, which no
    backward pass follows, needs that they do not: weights would be stale after the next update."""
    if hasattr(module, "set_reshard_after_forward"):
        sharded: Any = module
        sharded.set_reshard_after_forward(not hold)
        sharded.set_reshard_after_forward(False, recurse=False)  # the head is needed at once


def end_evaluation(module: nn.Module) -> None:
    """Let go of weights gathered for a forward pass that no backward pass followed."""
    if hasattr(module, "reshard"):
        module.reshard()  # pyright: ignore[reportCallIssue]
    module.train()


def stored_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to a model's state. Only mixers of a user's own have any."""
    buffers = list(model.named_buffers())
    stored = model.state_dict().keys() if buffers else ()
    return [(name, buffer) for name, buffer in buffers if name in stored]


def full_state(model: LanguageModel, vocab_size: int) -> dict[str, Tensor]:
    """All weights and stored buffers on the CPU, without the rows that padded the vocabulary. A
    step of all processes; they all get them."""
    state: dict[str, Tensor] = {}
    for name, parameter in (*model.named_parameters(), *stored_buffers(model)):
        whole: Any = parameter.detach()
        if hasattr(whole, "full_tensor"):
            whole = whole.full_tensor()
        if name in ("embedding.tokens.weight", "head.weight"):
            whole = whole[:vocab_size]
        state[name] = whole.cpu().clone()
    return state


def compile_errors() -> tuple[type[BaseException], ...]:
    """What a compiler raises when it cannot do its work."""
    import torch._dynamo.exc as dynamo

    found: list[type[BaseException]] = [dynamo.TorchDynamoException]
    try:
        from torch._inductor.exc import InductorError

        found.append(InductorError)
    except ImportError:
        pass
    return tuple(found)


def out_of_memory_advice(micro_batch: int) -> RecallzooError:
    """For several processes, which cannot agree on a smaller micro-batch within a step."""
    return RecallzooError(
        f"a GPU is out of memory with --micro-batch {micro_batch}. Give a smaller one, "
        f"--checkpoint-activations, or --parallel fsdp. What was saved is kept."
    )
