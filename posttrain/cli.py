"""The front door. Heavy imports happen inside the commands, after the config has been read."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.errors import UserError

if TYPE_CHECKING:
    from fusion.config import PipelineConfig
    from fusion.pipeline import Pipeline

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Train Agent, Reasoning and Interaction experts by asynchronous RL and fuse them into one student.",
)  # fmt: skip
model_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What a model is, before there is one.")
app.add_typer(model_app, name="model")
worlds_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Whether worlds judge rightly.")
app.add_typer(worlds_app, name="worlds")

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="a.b.c=VALUE on top of the file; repeatable.")]
Out = Annotated[Path, typer.Option("--out", help="Directory of the run; an earlier try in it goes on.")]
Check = Annotated[bool, typer.Option("--check", help="Only check the config.")]


@app.command()
def run(config: ConfigPath, out: Out = Path("runs/run"), set_: Overrides = None, check: Check = False) -> None:
    """The whole pipeline: cold start, experts, fusion, evaluation, report."""
    _go(config, out, set_, check, "run")


@app.command()
def convert(config: ConfigPath, out: Out = Path("runs/run"), set_: Overrides = None, check: Check = False) -> None:
    """Make the attention of the model that everything starts from sparse, training that model if it is not there."""
    _go(config, out, set_, check, "convert")


@app.command()
def expert(
    config: ConfigPath,
    name: Annotated[str, typer.Argument(help="Which of the config's experts.")],
    out: Out = Path("runs/run"),
    set_: Overrides = None,
    check: Check = False,
) -> None:
    """Train one expert, and the model it starts from if that is not there."""
    _go(config, out, set_, check, "expert", name)


@app.command()
def fuse(config: ConfigPath, out: Out = Path("runs/run"), set_: Overrides = None, check: Check = False) -> None:
    """Fuse the experts into one student, training what is missing."""
    _go(config, out, set_, check, "fuse")


@app.command(name="eval")
def evaluate(config: ConfigPath, out: Out = Path("runs/run"), set_: Overrides = None, check: Check = False) -> None:
    """Evaluate base, experts and student on held-out tasks, training what is missing. The same as run."""
    _go(config, out, set_, check, "eval")


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Directory of a run.", metavar="DIR")]) -> None:
    """Write the report of a run again, finished or not."""
    from fusion.report import write_report
    from posttrain.run import RunDir

    print(write_report(RunDir.require(directory)))


@app.command()
def why(directory: Annotated[Path, typer.Argument(help="Directory of a run.", metavar="DIR")]) -> None:
    """Who waits for whom in a run, on which trajectory, since when: for one that seems to stand still."""
    import time

    from posttrain import waits
    from posttrain.run import RunDir

    where = RunDir.require(directory)
    found = waits.why(where.waits_file, time.time())
    if found is None:
        state = "the run is finished" if where.results_file.exists() else "no stage that keeps records is under way"
        stages = ", ".join(where.seconds()) or "none"
        found = f"nobody waits: {state}. Finished stages: {stages}. What was done is in {where.log_file}"
    print(found)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML file of a run.", metavar="[CONFIG]")] = None,
    set_: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What this machine can run and why not; with CONFIG, whether it can run that: exit status 1 if not."""
    import json

    from rich.console import Console

    from fusion.doctor import diagnose, lines, memory_lines, table, verdict

    found = diagnose(config, None if config is None else _load(config, set_, "doctor", None))
    if json_:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        console = Console()
        console.print(table(found)) if console.is_terminal else print("\n".join(lines(found)))
        for line in (*memory_lines(found.plans, found.on_gpu), verdict(found)):
            print(line)
    if not found.runs:
        raise typer.Exit(1)


@app.command()
def simulate(
    config: ConfigPath,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file for the figures.", metavar="FILE.json")] = None,
    set_: Overrides = None,
) -> None:
    """Plan a stage at any size, asynchronous against synchronous, without running it: see docs/async.md."""
    from rich.console import Console
    from rich.progress import Progress

    from posttrain.config import load
    from posttrain.files import write_json
    from posttrain.simulate import simulate as plan
    from posttrain.simulate import table
    from posttrain.simulate_settings import SimulationConfig

    spec = load(SimulationConfig, config, set_ or [])
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    with Progress(transient=True) as progress:
        steps = progress.add_task("planned, then synchronous", total=2 * spec.loop.steps)
        found = plan(spec, lambda step: progress.advance(steps))
    Console().print(table(found))
    if out is not None:
        write_json(out, found.to_dict())


@model_app.command()
def describe(
    config: Annotated[
        Path, typer.Argument(help="YAML of official fields, a config.json, or its folder.", metavar="CONFIG")
    ],
) -> None:
    """Parameters of every part, active parameters and cache bytes of a LongCat model."""
    from rich.console import Console
    from transformers.utils.logging import set_verbosity_error

    from posttrain.model.config_files import read_config
    from posttrain.model.describe import tables

    set_verbosity_error()  # transformers compares YaRN's factor with the length that a model is served at
    Console().print(*tables(read_config(config)))


@worlds_app.command(name="check")
def check_worlds(config: ConfigPath, set_: Overrides = None) -> None:
    """Play the reference and the empty solution in every world of a config: they must score 1 and 0."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from envs.worlds import make_world
    from fusion.preflight import preflight_worlds

    worlds = _load(config, set_, "worlds", None).worlds
    preflight_worlds(config, worlds)
    table = Table("world", "type", "reference", "empty")
    wrong: list[str] = []
    for name, spec in track(worlds.items(), "checking", transient=True):
        found = asyncio.run(make_world(spec, name).check())
        table.add_row(name, spec.type, f"{found['reference']:g}", f"{found['empty']:g}")
        if found != {"reference": 1.0, "empty": 0.0}:
            wrong.append(name)
    Console().print(table)
    if wrong:
        raise UserError(f"{config}: worlds.{wrong[0]}: its reference must score 1 and its empty solution 0")


def _load(path: Path, overrides: list[str] | None, what: str, expert_name: str | None) -> PipelineConfig:
    from fusion.config import PipelineConfig
    from posttrain.config import load
    from posttrain.errors import ConfigError

    config = load(PipelineConfig, path, overrides or [])
    if what == "convert" and config.conversion is None:
        raise ConfigError(f"{path}: conversion: is not set; configs/tiny/sparse.yaml and zigzag.yaml show one")
    if expert_name is not None and expert_name not in config.experts:
        raise ConfigError(f"{path}: experts: there is no `{expert_name}`; choose one of {', '.join(config.experts)}")
    return config


def _go(path: Path, out: Path, overrides: list[str] | None, check: bool, what: str, name: str | None = None) -> None:
    config = _load(path, overrides, what, name)
    if check:
        print(f"{path}: good")
        return
    from fusion.preflight import preflight
    from posttrain.run import RunDir, start_logging

    preflight(path, config)
    with RunDir.open(out, config) as directory:
        start_logging(directory.log_file)
        from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

        from fusion.pipeline import Pipeline

        with Progress(SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()) as progress:
            pipeline = Pipeline(config, directory, progress)
            try:
                found = asyncio.run(_work(pipeline, what, name))
            finally:
                pipeline.close()
        if isinstance(found, Path):
            print(found)
        else:
            _show(found, directory)


def _work(pipeline: Pipeline, what: str, name: str | None) -> Coroutine[Any, Any, Any]:
    match what:
        case "convert":
            return pipeline.base()
        case "expert":
            assert name is not None
            return pipeline.expert(name)
        case "fuse":
            return pipeline.student()
        case _:
            return pipeline.evaluation()


def _show(found: dict[str, Any], directory: Any) -> None:
    from rich.console import Console

    from fusion.results import table, verdict

    Console().print(table(found))
    for line in verdict(found):
        print(line)
    print(f"results: {directory.results_file}\nreport:  {directory.report_file.resolve()}")


def main() -> None:
    """Entry of the console script: a UserError is one message and exit status 2, a pause one and 3."""
    try:
        app()
    except UserError as error:
        from posttrain.watch import Paused

        paused = isinstance(error, Paused)
        print(error if paused else f"error: {error}", file=sys.stderr)
        raise SystemExit(3 if paused else 2) from None
    except OSError as error:
        from posttrain.files import no_room

        if not no_room(error):
            raise
        where = error.filename or "a file"
        print(f"error: {where}: the disk is full. Make room there; the same command goes on", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
