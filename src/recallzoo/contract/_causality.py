"""Which inputs an output depends on: none after it, none of other rows.

Dependence is looked for twice. Inputs are changed and the outputs compared, which also finds what
goes through comparisons and sorting. And gradients are taken, which finds what one change does not
happen to move.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from recallzoo.contract._report import Violation
from recallzoo.contract._subject import TOLERANCE, VOCAB_SIZE, Subject, call, size_of

Leak = tuple[int, bool, int, str]
"""Output position, whether many inputs were changed, (first) input position, what was seen: in
this order the least is the one to tell."""


def leaks_by_change(
    subject: Subject, training: bool, positions: Iterable[int] | None = None
) -> Iterator[Leak]:
    """Change the input at one position, then at it and all later ones, for every position but the
    first, or for those given."""
    mixer, x, tokens = subject.shaken(), subject.x(), subject.tokens()
    other = subject.x(seed=1)
    with torch.no_grad():
        y = call(mixer, x, tokens, training=training)
        for s in range(1, subject.seq_len) if positions is None else positions:
            for scale, changed, end in ((1.0, "input at", s + 1), (8.0, "inputs from", None)):
                x_changed = x.clone()
                x_changed[:, s:end] = scale * other[:, s:end]
                y_changed = call(mixer, x_changed, tokens, training=training)
                yield from _changes_before(y, y_changed, s, changed)
            for shift in (0, 1) if mixer.needs_tokens or subject.own else ():
                tokens_changed = tokens.clone()
                tokens_changed[:, s] = (tokens[:, s - 1] + shift) % VOCAB_SIZE
                y_changed = call(mixer, x, tokens_changed, training=training)
                yield from _changes_before(y, y_changed, s, "token at")


def _changes_before(y: Tensor, y_changed: Tensor, s: int, changed: str) -> Iterator[Leak]:
    difference = (y_changed - y)[:, :s].abs().amax((0, 2))
    for t in (difference > TOLERANCE * size_of(y)).nonzero().flatten().tolist():
        on = " on change" if changed == "inputs from" else " changes"
        seen = f"changes by {float(difference[t]):.2g} when the {changed} t={s}{on}"
        yield t, changed == "inputs from", s, seen


def leaks_by_gradient(subject: Subject, training: bool) -> Iterator[Leak]:
    """Gradients of the output at every position with respect to later inputs."""
    x = subject.x().requires_grad_()
    y = call(subject.shaken(), x, subject.tokens(), training=training)
    if not y.requires_grad:
        return
    weights = subject.x(seed=2)
    largest = 1e-12
    found: list[tuple[int, int, float]] = []
    for t in range(subject.seq_len):
        (gradient,) = torch.autograd.grad(
            (y * weights)[:, t].sum(),
            x,
            retain_graph=True,
            allow_unused=True,  # as by a mixer that reads tokens alone
            materialize_grads=True,
        )
        largest = max(largest, size_of(gradient))
        by_position = gradient[:, t + 1 :].abs().amax((0, 2)).tolist()
        found += [(t, t + 1 + i, value) for i, value in enumerate(by_position) if value > 0]
    for t, s, value in found:
        if value > TOLERANCE * largest:
            yield t, False, s, f"has a gradient of {value:.2g} with respect to the input at t={s}"


def causal(subject: Subject, training: bool) -> str:
    """Output at t ignores inputs after t."""
    by_change = list(leaks_by_change(subject, training))
    leaks = by_change or list(leaks_by_gradient(subject, training))
    if not subject.fresh().causal:
        if not leaks:
            return "declared as not causal, though no output was seen to look ahead"
        t, _, s, _ = min(leaks)
        return f"declared as not causal; the output at t={t} depends on the input at t={s}"
    if leaks:
        raise Violation(_told(leaks))
    return f"no output among {subject.seq_len} depends on a later input"


def _told(leaks: list[Leak]) -> str:
    t, _, _, seen = min(leaks)
    positions = len({leak[0] for leak in leaks})
    return (
        f"the output at t={t} {seen}. It may depend on inputs up to t={t} only"
        f"{f' ({positions} positions leak)' if positions > 1 else ''}."
    )


def require_causal_at(subject: Subject, positions: Iterable[int]) -> None:
    """Raise Violation where an output before one of `positions` depends on what comes from there
    on. All calls are of one length, so that in training their masks of dropout are the same."""
    for training in (True, False):
        if leaks := list(leaks_by_change(subject, training, positions)):
            raise Violation(
                f"it looks ahead: in {'training' if training else 'evaluation'}, at "
                f"{subject.seq_len} tokens, {_told(leaks)}"
            )


def rows_apart(subject: Subject) -> str:
    """The rows of a batch do not see each other."""
    x, tokens = subject.x(), subject.tokens()
    x_changed = torch.cat([x[:1], 3.0 * subject.x(seed=3)[1:]])
    tokens_changed = torch.cat([tokens[:1], subject.tokens(seed=3)[1:]])
    for training in (True, False):
        mode = "training" if training else "evaluation"
        mixer = subject.shaken()
        with torch.no_grad():
            y = call(mixer, x, tokens, training=training)
            y_changed = call(mixer, x_changed, tokens_changed, training=training)
        difference = (y_changed - y)[0].abs().amax(-1)
        moved = difference > TOLERANCE * size_of(y)
        if moved.any():
            t = int(moved.int().argmax())
            raise Violation(
                f"in {mode} the output of row 0 at t={t} changes by {float(difference[t]):.2g} "
                f"when row 1 changes. Every row of a batch is a sequence of its own."
            )
    with torch.no_grad():
        mixer = subject.shaken()
        together = call(mixer, x, tokens)[:1]
        alone = call(mixer, x[:1], tokens[:1])
    if float((alone - together).abs().max()) > TOLERANCE * size_of(together):
        raise Violation(
            f"a row alone differs from the same row in a batch of {x.shape[0]} by "
            f"{size_of(alone - together):.2g}."
        )
    return ""
