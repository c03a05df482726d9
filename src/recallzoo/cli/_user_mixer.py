"""Check a user's own mixer before anything is trained with it."""

from typing import Any

from recallzoo.contract import ContractReport, check_mixer
from recallzoo.errors import ContractViolation, UserError
from recallzoo.mixers import MixerConfig, mixer, state_size
from recallzoo.preflight import check_runs
from recallzoo.run import Run, describe


def check(names: tuple[str, ...], runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Check each mixer, and print what was found.

    Returns the reports by file name, to be stored with the results. Raises ContractViolation
    for a mixer whose accuracy would be false, or that cannot be trained.
    """
    reports: dict[str, dict[str, Any]] = {}
    for name in names:
        config, d_model, seq_len = _largest(name, runs)
        report = _checked(name, config)
        check_runs([run for run in runs if config in run.model.mixers])  # at all of its sizes
        print(_state(config, d_model, seq_len), flush=True)
        short = name.rpartition(":")[2]
        reports[f"{short}-{(config.source_sha256 or '')[:12]}"] = {
            "mixer": describe(config),
            "d_model": d_model,
            "seq_len": seq_len,
            "passed": report.passed,
            "summary": report.summary(),
        }
    return reports


def check_for_text(name: str, precision: str) -> None:
    """Check a mixer that a language model is to be made of, and print what was found.

    Raises ContractViolation for one whose loss would be false, or that cannot be trained; UserError
    if it does not work in that precision.
    """
    report = _checked(name, mixer(name))
    bfloat16 = next(check for check in report.checks if check.name == "bfloat16")
    if precision == "bf16" and not bfloat16.passed:
        raise UserError(
            f"{name} does not work in bfloat16 ({bfloat16.detail}), in which language models are "
            f"trained unless --precision says otherwise. Give --precision fp32, or change the "
            f"mixer."
        )


def _checked(name: str, config: MixerConfig) -> ContractReport:
    print(f"checking {name}", flush=True)
    report = check_mixer(config)
    print(report.summary(), flush=True)
    if not report.passed:
        raise ContractViolation(
            f"{name} is refused: {'; '.join(map(str, report.failures))} Nothing was trained."
        )
    return report


def _largest(name: str, runs: list[Run]) -> tuple[MixerConfig, int, int]:
    """The mixer with the largest width and length at which `runs` will train it."""
    using = [(run, c) for run in runs for c in run.model.mixers if c.name == name]
    if not using:
        raise UserError(f"no run of the recipe uses {name}.")
    return (
        using[0][1],
        max(run.model.d_model for run, _ in using),
        max(run.data.max_seq_len for run, _ in using),
    )


def _state(config: MixerConfig, d_model: int, seq_len: int) -> str:
    built = config.build(d_model, seq_len)
    where = f"state after {seq_len} tokens at width {d_model}"
    if not built.has_step:
        return f"{where}: unknown, because the mixer has no step and init_cache"
    parts = state_size(built, seq_len)
    kinds = ", ".join(f"{kind} {size:,}" for kind, size in parts.items())
    return f"{where}: {sum(parts.values()):,} elements a layer ({kinds})"
