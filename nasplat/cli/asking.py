"""The options that describe a study, shared by the commands that search and that look ahead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from nasplat import plugins
from nasplat.cli.app import Record
from nasplat.cli.values import (
    DEFAULT_PRESET,
    TASKS,
    assignments,
    baseline_of,
    constraint_of,
    objective_of,
    plugin_of,
    task_of,
)
from nasplat.study import Study

Trials = Annotated[int, typer.Option(metavar="N", help="Trials over all runs of the study.")]
Workers = Annotated[int, typer.Option(metavar="W", help="Trials at a time, on Ray; 0: one by one, here.")]
SpaceName = Annotated[
    str,
    typer.Option(
        metavar="NAME[:PRESET]",
        help=f"Search space. A plain name takes the preset '{DEFAULT_PRESET}' where the space has one.",
        show_default=False,
    ),
]
SpaceParams = Annotated[
    list[str] | None, typer.Option("--space-param", "-s", metavar="KEY=VALUE", help="Parameter of the space.")
]


def study_of(
    *,
    space: SpaceName,
    task: Annotated[str, typer.Option(metavar="NAME", help=f"Task: {', '.join(TASKS)}.", show_default=False)],
    folder: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The study's folder; made, or gone on with if it holds the same study."),
    ],
    strategy: Annotated[str, typer.Option(metavar="NAME[:PRESET]", help="Strategy.")] = "regularized_evolution",
    space_param: SpaceParams = None,
    strategy_param: Annotated[
        list[str] | None, typer.Option("--strategy-param", "-p", metavar="KEY=VALUE", help="Parameter of the strategy.")
    ] = None,
    task_param: Annotated[
        list[str] | None,
        typer.Option("--task-param", "-t", metavar="KEY=VALUE", help="Parameter of the task: epochs, size, lr, ..."),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            metavar="max:METRIC",
            help="Or min:METRIC; may be repeated, the first names the best. Default: max:val_accuracy.",
        ),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'METRIC<=X'",
            help="Hard limit, or 'METRIC>=X'; may be repeated. X is a number, or a percentage of a baseline: '60%', "
            "'60% of NAME'.",
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Network that limits are a percentage of: an architecture.json as exports write it, or genes as JSON; "
            "may be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where to train and measure: cpu, cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(metavar="N", help="Threads of torch for each trial.")] = 1,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="A trial that takes longer has failed.")
    ] = None,
    tracker: Annotated[Record, typer.Option(help="Where to record, beside the folder.")] = Record.MLFLOW,
    experiment: Annotated[
        str | None, typer.Option(metavar="NAME", help="MLflow experiment. Default: nasplat.", show_default=False)
    ] = None,
) -> Study:
    """The study that the options describe."""
    return Study(
        space=plugin_of(plugins.SPACES, space, assignments(space_param, "--space-param")),
        strategy=plugin_of(plugins.STRATEGIES, strategy, assignments(strategy_param, "--strategy-param")),
        task=task_of(task, assignments(task_param, "--task-param")),
        objectives=[objective_of(text) for text in objective or ["max:val_accuracy"]],
        constraints=[constraint_of(text) for text in constraint or []],
        baselines={name: baseline_of(name, text) for name, text in assignments(baseline, "--baseline").items()},
        seed=seed,
        folder=folder,
        tracker=tracker_of(tracker, experiment),
        device=device,
        threads=threads,
        time_limit_s=time_limit,
    )


def asks_for_a_study(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of :func:`study_of` in place of its parameter ``study``."""
    own = list(inspect.signature(study_of).parameters.values())
    rest = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "study"
    ]
    hints = {
        **get_type_hints(study_of, include_extras=True),
        **get_type_hints(command, include_extras=True),
    }
    names = {parameter.name for parameter in own}

    def asking(**given: Any) -> None:
        study = study_of(**{name: value for name, value in given.items() if name in names})
        command(study=study, **{name: value for name, value in given.items() if name not in names})

    asking.__name__, asking.__doc__, asking.__module__ = command.__name__, command.__doc__, command.__module__
    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in (*own, *rest)]
    asking.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    asking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return asking


def tracker_of(record: Record, experiment: str | None) -> Any:
    """The tracker that the options name."""
    if record is Record.NONE:
        return None
    if experiment is None:
        return "mlflow"
    from nasplat.mlflow_tracker import MlflowTracker

    return MlflowTracker(experiment=experiment)
