"""Train the runs of a recipe, and print which mixers solve the task.

usage: recallzoo run RECIPE [OPTIONS]
       recallzoo run path/to/recipe.py[:function] [OPTIONS]
       recallzoo run --mixer path/to/file.py:Class [RECIPE] [OPTIONS]

Runs that a results folder holds already are not trained again, and an interrupted command goes
on where it stopped: run it once more. With --minutes it stops by itself, with exit code 75.
Nor are those that stand in a table of runs (--known): the table.parquet of a folder that is gone,
or one that was published.

A mixer of your own (--mixer) needs no change to this package: any nn.Module built as
Class(d_model, max_seq_len, **options) whose forward takes [B, T, D] and returns the same. It is
first checked (does it look ahead? does its recurrent form agree?), then trained beside
attention and base_conv.

examples:
  recallzoo run quickstart
  recallzoo run quickstart --dry-run
  recallzoo run ladder --mixers attention rwkv4 --seq-lens 32 64
  recallzoo run path/to/recipe.py:small --out runs/small --device cuda
  recallzoo run figure2 --seq-lens 64 --minutes 20
  recallzoo run figure2 --seq-lens 64 --known published/table.parquet
  recallzoo run --mixer my_mixer.py:MyMixer
"""

import dataclasses
import inspect
import math
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from recallzoo.cli._options import parse
from recallzoo.errors import EXIT_OUT_OF_TIME, UserError
from recallzoo.files import require_folder
from recallzoo.recipes import Recipe, find_recipes, load

if TYPE_CHECKING:
    from recallzoo.cli._known import Known
    from recallzoo.result import Result
    from recallzoo.run import Run
    from recallzoo.sweep import SweepOptions

RECIPE_FOR_MIXERS = "ladder"
"""Trained by `--mixer` when no recipe is named."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How and where to train; nothing here changes a result."""

    out: Path | None = None
    """Folder for the results. runs/RECIPE if not given."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N."""
    max_pack_size: int | None = None
    """Most runs to train at once; what is expected to fit into memory if not given."""
    compile: Literal["auto", "step", "none"] = "auto"
    """Compile the training step; auto: on CUDA, for packs that train long enough to gain by it."""
    checkpoint_seconds: float = 60.0
    """Time between two checkpoints of a pack, in seconds."""
    minutes: float | None = None
    """Time to train for: then no further pack is begun, and those in training stop at a
    checkpoint. Exit code 75 if runs are left: the same command goes on."""
    executor: Literal["local", "ray"] = "local"
    """This process, or the devices of a Ray cluster; OUT is then a folder all machines share."""
    ray_address: str | None = None
    """host:port of the cluster, or auto; RAY_ADDRESS, or this machine alone, if not given."""
    devices: int | None = None
    """Most devices of the cluster to use at once; all if not given."""
    packs_per_device: int = 1
    """Packs that share a device of the cluster, each with its part of the memory: one trains while
    another compiles. Keeps one GPU busy too: --executor ray --packs-per-device 4."""
    device_sharing: Literal["auto", "mps", "turns"] = "auto"
    """How they share a GPU: at once, through NVIDIA's Multi-Process Service, which this command
    starts and ends, or in turns. auto: at once, where it starts and the cluster is made here."""
    dry_run: bool = False
    """Print the runs, and which train together, but train nothing."""
    mixer: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE.py:CLASS")
    ] = ()
    """A mixer of your own, to be checked and then trained. Give it again for another one."""
    known: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TABLE.parquet")
    ] = ()
    """A table of runs, as a results folder has one: runs that stand in it are not trained, but
    counted with the others when it ends. Give it again for another table."""

    def __post_init__(self) -> None:
        if self.max_pack_size is not None and self.max_pack_size < 1:
            raise UserError(f"--max-pack-size {self.max_pack_size} must be at least 1.")
        if not (self.checkpoint_seconds >= 0 and math.isfinite(self.checkpoint_seconds)):
            raise UserError(
                f"--checkpoint-seconds {self.checkpoint_seconds} must be a time of 0 or more."
            )
        if self.minutes is not None and not (self.minutes > 0 and math.isfinite(self.minutes)):
            raise UserError(f"--minutes {self.minutes} must be a finite time above 0.")


def main(argv: list[str]) -> int:
    """`recallzoo run`."""
    name, rest = _take_recipe(argv)
    if name is None:
        if any(argument in ("-h", "--help") for argument in rest) and not _names_mixer(rest):
            parse(RunOptions, ["--help"], "run RECIPE", _help_with_recipes())
        if not _names_mixer(rest):
            raise UserError(
                f"name a recipe ({', '.join(find_recipes())}), a file path/to/recipe.py, or a "
                f"mixer with --mixer path/to/file.py:Class. recallzoo run --help explains."
            )
        name = RECIPE_FOR_MIXERS
    recipe = load(name)
    options, chosen = _parse_with_recipe(recipe, name, rest)
    folder = options.out or Path("runs") / recipe.name
    require_folder(folder, "a results folder")
    reports = {}
    if options.mixer:
        chosen = _with_mixers(recipe, options, chosen)
    runs = recipe.runs(**chosen)
    _sweep_options(options)  # what a sweep would refuse is refused before anything is written
    known = _find_known(runs, folder, options)
    if options.dry_run:
        _print_plan(runs, folder, options, known)
        return 0
    if any(one.source_sha256 for run in runs for one in run.model.mixers):
        from recallzoo.cli._user_mixer import check

        reports = check(options.mixer, runs)
    command = shlex.join(["recallzoo", "run", *argv])
    results = _train(runs, folder, options, reports, command, known)
    _print_outcome(results, folder, known)
    if len(results) < len(runs):
        print(
            f"stopped for --minutes {options.minutes:g}: {len(runs) - len(results)} of {len(runs)} "
            f"runs are left; run the same command to go on.",
            file=sys.stderr,
        )
        return EXIT_OUT_OF_TIME
    if options.mixer:
        from recallzoo.cli._verdict import print_verdict

        print_verdict(options.mixer, results, sys.stdout)
    return 0


def _take_recipe(argv: list[str]) -> tuple[str | None, list[str]]:
    """The recipe and the remaining arguments.

    Options of `run` may stand before it. After an option of a recipe, which takes any number of
    values, no name is looked for.
    """
    num_values = {"-h": 0, "--help": 0} | {
        f"--{f.name.replace('_', '-')}": int(f.type is not bool)
        for f in dataclasses.fields(RunOptions)
    }
    position = 0
    while position < len(argv):
        argument = argv[position]
        if not argument.startswith("-"):
            return argument, argv[:position] + argv[position + 1 :]
        option, has_value, _ = argument.partition("=")
        option = option.replace("_", "-")
        if option not in num_values:
            return None, argv
        position += 1 if has_value else 1 + num_values[option]
    return None, argv


def _names_mixer(argv: list[str]) -> bool:
    return any(argument.partition("=")[0] == "--mixer" for argument in argv)


def _parse_with_recipe(
    recipe: Recipe, name: str, argv: list[str]
) -> tuple[RunOptions, dict[str, Any]]:
    """Options of the command, and those of the recipe, from one command line."""
    if not recipe.parameters:
        return parse(RunOptions, argv, f"run {name}", _recipe_help(recipe, name)), {}
    taken = {f.name for f in dataclasses.fields(RunOptions)}
    for parameter in recipe.parameters:
        if parameter.name in taken:
            raise UserError(
                f"{recipe.where}: option {parameter.name!r} of recipe {recipe.name} is also an "
                f"option of `recallzoo run`. Rename it."
            )
    own = dataclasses.make_dataclass(
        recipe.name,
        [(p.name, p.type, field(default_factory=lambda p=p: p.default)) for p in recipe.parameters],
    )
    own.__doc__ = inspect.getdoc(recipe.function)
    both = dataclasses.make_dataclass(
        "RecipeAndRun",
        [
            (recipe.name, own, field(default_factory=own)),
            ("run", RunOptions, field(default_factory=RunOptions)),
        ],
    )
    parsed = parse(both, argv, f"run {name}", _recipe_help(recipe, name))
    values = getattr(parsed, recipe.name)
    return parsed.run, {p.name: getattr(values, p.name) for p in recipe.parameters}


def _recipe_help(recipe: Recipe, name: str) -> str:
    first = next((p for p in recipe.parameters if isinstance(p.default, int | float | str)), None)
    examples = [f"recallzoo run {name}", f"recallzoo run {name} --dry-run"]
    if first is not None:
        option = first.name.replace("_", "-")
        examples.append(f"recallzoo run {name} --{option} {first.default} --out runs/mine")
    return "\n".join([recipe.summary, "", "examples:", *(f"  {line}" for line in examples)])


def _help_with_recipes() -> str:
    lines = [f"  {found.name:<16} {found.summary}" for found in find_recipes().values()]
    return "\n".join([inspect.cleandoc(__doc__ or ""), "", "recipes:", *lines])


def _with_mixers(recipe: Recipe, options: RunOptions, chosen: dict[str, Any]) -> dict[str, Any]:
    if "mixers" not in chosen:
        raise UserError(
            f"recipe {recipe.name} has no option `mixers`, so it cannot train "
            f"{' and '.join(options.mixer)}. Leave the recipe out: recallzoo run --mixer "
            f"{options.mixer[0]} trains {RECIPE_FOR_MIXERS}."
        )
    return {**chosen, "mixers": tuple(dict.fromkeys((*chosen["mixers"], *options.mixer)))}


def _sweep_options(options: RunOptions) -> "SweepOptions":
    from recallzoo.sweep import SweepOptions

    return SweepOptions(
        device=options.device,
        max_pack_size=options.max_pack_size,
        compiled={"auto": None, "step": True, "none": False}[options.compile],
        checkpoint_seconds=options.checkpoint_seconds,
        executor=options.executor,
        ray_address=options.ray_address,
        devices=options.devices,
        packs_per_device=options.packs_per_device,
        device_sharing=options.device_sharing,
        seconds=None if options.minutes is None else 60 * options.minutes,
    )


def _find_known(runs: "list[Run]", folder: Path, options: RunOptions) -> "Known":
    from recallzoo.cli._known import Known, find_known

    return find_known(runs, options.known, folder) if options.known else Known()


def _train(
    runs: "list[Run]",
    folder: Path,
    options: RunOptions,
    reports: dict[str, dict[str, Any]],
    command: str,
    known: "Known",
) -> "list[Result]":
    """The results of all runs, those that are known among them, or of those that are finished."""
    from recallzoo.cli._progress import SweepProgress
    from recallzoo.files import write_json
    from recallzoo.preflight import check_runs
    from recallzoo.store import Store
    from recallzoo.sweep import sweep

    check_runs(runs)
    results = dict(known.results)
    for line in [*known.counts, *(f"warning: {note}" for note in known.notes)]:
        print(line, file=sys.stderr)
    if len(results) == len(runs):
        print("nothing is left to train", file=sys.stderr)
        return [results[run.hash] for run in runs]
    store = Store(folder)
    for _ in store.results():
        pass  # a damaged run is reported before hours of training, not after
    store.add_command(command)
    for name, report in reports.items():
        write_json(store.folder / "contracts" / f"{name}.json", report)
    progress = SweepProgress()
    trained = sweep(runs, store, progress, _sweep_options(options), results.keys())
    for warning in progress.warnings:
        print(f"note: {warning}")
    results |= {result.hash: result for result in trained}
    return [results[run.hash] for run in runs if run.hash in results]


def _print_outcome(results: "list[Result]", folder: Path, known: "Known") -> None:
    from recallzoo.cli._outcome import notes, print_table

    if not results:
        print(f"no run is finished in {folder} yet")
        return
    print_table(results, sys.stdout)
    for line in [*notes(results), *known.notes, *known.remarks]:
        print(f"note: {line}")
    in_folder = any(result.hash not in known.results for result in results)
    places = [*([str(folder)] if in_folder else []), *map(str, known.tables)]
    out = " --out report" if known.tables else ""
    print(f"results: {' and '.join(places)}; charts: recallzoo report {shlex.join(places)}{out}")


def _print_plan(runs: "list[Run]", folder: Path, options: RunOptions, known: "Known") -> None:
    """What would be trained, and together with what."""
    import torch

    from recallzoo.devices import choose_device
    from recallzoo.executors.devices import runs_that_fit
    from recallzoo.files import is_vacant
    from recallzoo.preflight import check_runs
    from recallzoo.store import Store
    from recallzoo.sweep import make_plan

    check_runs(runs)
    on_ray = options.executor == "ray"
    device = torch.device("cpu") if on_ray else choose_device(options.device)
    store = None if is_vacant(folder) else Store(folder, create=False)
    finished = {run.hash for run in runs if store is not None and store.has(run.hash)}
    plan = make_plan(
        runs,
        store,
        lambda run: runs_that_fit(run, device),
        options.max_pack_size,
        known.results.keys(),
    )
    packs = [*(members for _, members in plan.recorded), *plan.new]
    num_known = len(known.results.keys() - plan.known)
    stand = f"{num_known} in tables, " if options.known else ""
    print(
        f"{len(runs)} runs, {len(finished)} finished in {folder}, {stand}"
        f"{len(runs) - len(finished) - num_known} to train on {'Ray' if on_ray else device} in "
        f"{len(packs)} packs"
    )
    for line in known.counts:
        print(line)
    if on_ray and options.max_pack_size is None:
        print("pack sizes are those of a CPU; the cluster's devices decide when it runs")
    for note in [*plan.notes, *known.notes]:
        print(f"note: {note}")
    for number, members in enumerate(packs, start=1):
        recorded = ", recorded by an earlier command" if number <= len(plan.recorded) else ""
        print(f"pack {number}: {_in_short(members[0])}{recorded}")
        for run in members:
            print(
                f"  {run.hash} learning rate {run.optimizer.learning_rate:g}, seed {run.seed}, "
                f"{run.budget.num_epochs} epochs{', finished' if run.hash in finished else ''}"
            )


def _in_short(run: "Run") -> str:
    tasks = dict.fromkeys(
        f"{s.task.name} T={s.task.seq_len} Q={s.task.num_queries}" for s in run.data.test
    )
    return f"{run.model_label} d={run.model.d_model}, {', '.join(tasks)}"
