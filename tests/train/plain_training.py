"""A run trained the plain way: one model, one loop, torch.optim.AdamW. What the packed trainer
must equal, and the definition of what a run's seed decides."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from recallzoo.mixers import Context
from recallzoo.model import LanguageModel
from recallzoo.random import mix64, permutation, seed_of
from recallzoo.run import Run
from recallzoo.tasks import Batch, make_split

DROPOUT_STRIDE = 0x9E3779B97F4A7C1
"""Between the dropout keys of two steps, before they are mixed."""


@dataclass
class Plain:
    """What came of it."""

    losses: list[float] = field(default_factory=list)
    """Before each step, in nats."""
    test_loss_nats: float = math.nan
    test_correct: list[Tensor] = field(default_factory=list)
    """For each segment of the test set, which queries are answered right, [N, Q]."""
    num_parameters: int = 0
    steps_per_epoch: int = 1

    @property
    def epoch_losses(self) -> list[float]:
        """Mean over the steps of each epoch, in nats."""
        n = self.steps_per_epoch
        return [sum(self.losses[i : i + n]) / n for i in range(0, len(self.losses), n)]

    @property
    def test_accuracy(self) -> float:
        return float(torch.cat([c.flatten() for c in self.test_correct]).double().mean())


def train_plainly(run: Run) -> Plain:
    """Train a run in float32 to the end of its budget."""
    model, plain = _model(run), Plain()
    dropout_seed = torch.tensor(seed_of("dropout", run.seed))
    plain.num_parameters = sum(p.numel() for p in model.parameters())
    segments = make_split(run.data, "train")
    batch_size, num_epochs = run.budget.batch_size, run.budget.num_epochs
    counts = [len(segment) // batch_size for segment in segments]
    plain.steps_per_epoch = sum(counts)
    optimizer, schedule = _optimizer(run, model, sum(counts) * num_epochs, sum(counts))
    for epoch in range(num_epochs):
        orders = [
            permutation(len(segment), "order", run.seed, i, epoch)
            for i, segment in enumerate(segments)
        ]
        steps = [(i, batch) for i, count in enumerate(counts) for batch in range(count)]
        taken = [0] * len(segments)
        for step in permutation(len(steps), "segments", run.data.seed, epoch).tolist():
            i = steps[step][0]
            rows = orders[i][taken[i] * batch_size : (taken[i] + 1) * batch_size]
            taken[i] += 1
            key = mix64(dropout_seed + len(plain.losses) * DROPOUT_STRIDE)
            loss, objective, _ = _loss(model, segments[i].rows(rows), key)
            plain.losses.append(loss.item())
            optimizer.zero_grad()
            objective.backward()
            if run.optimizer.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.max_grad_norm)
            optimizer.step()
            schedule.step()
    _test(run, model, plain)
    return plain


def _model(run: Run) -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("initialisation", run.seed))
        return LanguageModel(
            run.model,
            vocab_size=run.data.vocab_size,
            max_seq_len=run.data.max_seq_len,
            num_streams=run.data.num_streams,
        )


def _optimizer(run: Run, model: LanguageModel, num_steps: int, steps_per_epoch: int):
    settings, rules = run.optimizer, model.parameter_rules()
    groups = [
        {
            "params": [parameter],
            "lr": settings.learning_rate
            if rules[name].learning_rate is None
            else rules[name].learning_rate,
            "weight_decay": settings.weight_decay
            if rules[name].decay or settings.decayed == "all"
            else 0.0,
        }
        for name, parameter in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    warmup = math.ceil(settings.warmup_fraction * num_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if settings.schedule == "constant":
            return 1.0
        if settings.schedule == "cosine":
            share = (step - warmup) / max(1, num_steps - warmup)
        else:
            share = step // steps_per_epoch / (num_steps / steps_per_epoch)
        return 0.5 * (1 + math.cos(math.pi * share))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _loss(
    model: LanguageModel, batch: Batch, dropout_key: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of the answers; what is minimised; which queries are answered right."""
    context = Context(tokens=batch.tokens, dropout_key=dropout_key)
    logits = model.logits(model.hidden(batch.tokens, batch.query_positions, context=context))
    loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
    objective = loss + sum(context.losses.values())
    return loss, objective, logits.argmax(-1) == batch.answers


@torch.no_grad()
def _test(run: Run, model: LanguageModel, plain: Plain) -> None:
    segments, losses = make_split(run.data, "test"), []
    for segment in segments:
        loss, _, correct = _loss(model.eval(), segment)
        losses.append(loss.item() * segment.answers.numel())
        plain.test_correct.append(correct)
    plain.test_loss_nats = sum(losses) / sum(s.answers.numel() for s in segments)
