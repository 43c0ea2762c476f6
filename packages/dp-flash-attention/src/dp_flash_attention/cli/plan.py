"""``dpfa plan train`` and ``dpfa plan release``: what noise a promise needs, without touching data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from dp_flash_attention.cli.output import answers, down, print_json, side_by_side, size, two_columns, warn, working
from dp_flash_attention.numbers import number

app = typer.Typer(help="What noise a promise needs; no data and no tensor is touched.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Plot = Annotated[
    Path | None, typer.Option(help="Also draw epsilon against length, and noise against epsilon, to this PNG.")
]


@app.command("train")
def plan_train(
    delta: Annotated[float, typer.Option(help="Delta of the whole training.")],
    records: Annotated[int, typer.Option(help="Number of training records, or of users (public).")],
    epsilon: Annotated[float | None, typer.Option(help="Epsilon of the whole training.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise std / clip norm.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Expected Poisson batch size.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of records / batch size steps.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    unit: Annotated[str, typer.Option(help="example, or user: then records counts users.")] = "example",
    parameters: Annotated[
        int | None, typer.Option(help="Trained parameters: adds signal-to-noise and memory to the plan.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="sgd, momentum or adam, for the memory.")] = "adam",
    seconds_per_step: Annotated[float | None, typer.Option(help="Measured by you; nothing is guessed.")] = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Plan DP-SGD: leave out one of epsilon, noise multiplier, batch size, epochs or steps, and it is solved for.

    Example, what noise: dpfa plan train --epsilon 3 --delta 1e-5 --records 60000 --batch-size 256 --epochs 20
    Example, how long: dpfa plan train --epsilon 3 --delta 1e-5 --records 60000 --batch-size 256 --noise-multiplier 1
    """
    from dp_flash_attention.planning.plot import check_picture, draw_plan
    from dp_flash_attention.planning.training import TrainingQuestion, plan_training, training_event

    question = TrainingQuestion(
        delta=delta,
        records=records,
        epsilon=epsilon,
        noise_multiplier=noise_multiplier,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        unit=unit,
        parameters=parameters,
        optimizer=optimizer,
        seconds_per_step=seconds_per_step,
    )
    if plot is not None:
        check_picture(plot)
    with working() as say:
        answer, plan = plan_training(question, say)
        if plot is not None:
            draw_plan(
                plot,
                lambda z, count: training_event(z, answer.sampling_probability, count),
                answer.noise_multiplier,
                answer.steps,
                delta,
                plan["epsilons"],
                counted="steps",
                say=say,
            )
    plan["plot"] = None if plot is None else str(plot)
    if json:
        print_json(plan)
        return
    two_columns(
        "Training",
        [
            ("epsilon", f"{number(plan['epsilon'])} at delta = {delta:g}, one {unit}, add or remove"),
            ("noise multiplier", _noise(answer.noise_multiplier, given=noise_multiplier is not None)),
            ("batch size", f"{answer.batch_size} expected of {records}"),
            ("sampling probability", number(answer.sampling_probability)),
            ("steps", f"{answer.steps} ({down(plan['epochs'])} epochs)"),
            ("solved for", _words(question.unknown)),
        ],
    )
    _prices({"epsilon": plan["epsilons"]}, plan["no_bound"], plan["remarks"])
    ratio = answer.signal_to_noise
    two_columns(
        "What is left, and what it takes",
        [
            ("signal / noise of an update", "pass --parameters" if ratio is None else f"at most {down(ratio, 3)}"),
            *_memory(plan["memory_bytes"], "activations"),
            ("time", _time(plan["seconds"], "--seconds-per-step")),
        ],
    )
    _end(plan)


@app.command("release")
def plan_release(
    delta: Annotated[float, typer.Option(help="Delta of one call, and of all calls together.")],
    q_len: Annotated[int, typer.Option(help="Query rows of one batch row.")],
    epsilon: Annotated[float | None, typer.Option(help="Epsilon of one call: solves for the noise.")] = None,
    total_epsilon: Annotated[float | None, typer.Option(help="Epsilon of all calls: solves for the noise.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise / sensitivity: solves for epsilon.")] = None,
    calls: Annotated[int, typer.Option(help="Calls on the same records, composed.")] = 1,
    batch: Annotated[int, typer.Option(help="Batch rows.")] = 1,
    kv_len: Annotated[int | None, typer.Option(help="Keys; default: as many as queries.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 1,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads; default: as query heads.")] = None,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    unit: Annotated[str, typer.Option(help="sequence or token.")] = "sequence",
    relation: Annotated[str, typer.Option(help="replace or add_or_remove.")] = "replace",
    queries: Annotated[str | None, typer.Option(help="public or private; needed for tokens.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Causal mask.")] = False,
    window: Annotated[
        str, typer.Option(metavar="LEFT,RIGHT", help="Keys left and right of the diagonal; -1 is unlimited.")
    ] = "-1,-1",
    clip: Annotated[str, typer.Option(help="What is clipped: value or output.")] = "value",
    clip_norm: Annotated[float, typer.Option(help="Row clip.")] = 1.0,
    logit_bound: Annotated[float | None, typer.Option(help="Logit bound B; needed for tokens.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    mechanism: Annotated[str, typer.Option(help="Name of an installed mechanism.")] = "gaussian",
    noise_structure: Annotated[str | None, typer.Option(help="Structure of the Gaussian noise, e.g. low_rank.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of the mechanism, e.g. rank=16; repeatable.")
    ] = None,
    seconds_per_call: Annotated[float | None, typer.Option(help="Measured by you; nothing is guessed.")] = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Plan private attention calls: sensitivity, noise, and epsilon of one and of all calls.

    Example: dpfa plan release --epsilon 1 --delta 1e-6 --q-len 128 --unit token --queries private --logit-bound 1
    Example: dpfa plan release --noise-multiplier 4 --delta 1e-5 --q-len 128 --heads 8 --calls 100
    """
    from dp_flash_attention.planning.options import parameters_of, window_of
    from dp_flash_attention.planning.plot import check_picture, draw_plan
    from dp_flash_attention.planning.release import ReleaseQuestion
    from dp_flash_attention.planning.release import plan_release as plan_it
    from dpfa_core.events import SelfComposed
    from dpfa_core.spec import AttentionProblem

    problem = AttentionProblem(
        batch=batch,
        q_len=q_len,
        kv_len=q_len if kv_len is None else kv_len,
        q_heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        causal=causal,
        window=window_of(window),
        clip=clip,  # type: ignore[arg-type]
        clip_norm=clip_norm,
        logit_bound=logit_bound,
        dtype=dtype,
    )
    question = ReleaseQuestion(
        problem=problem,
        delta=delta,
        unit=unit,
        relation=relation,
        queries=queries,
        epsilon=epsilon,
        total_epsilon=total_epsilon,
        noise_multiplier=noise_multiplier,
        mechanism=mechanism,
        noise_structure=noise_structure,
        parameters=parameters_of(parameter or []),
        calls=calls,
        seconds_per_call=seconds_per_call,
    )
    if plot is not None:
        check_picture(plot)
    with working() as say:
        planner, plan = plan_it(question, say)
        if plot is not None:
            draw_plan(
                plot,
                lambda z, count: SelfComposed(planner.event(z), count),
                plan["noise_multiplier"],
                calls,
                delta,
                plan["total_epsilons"],
                counted="calls",
                say=say,
            )
    plan["plot"] = None if plot is None else str(plot)
    if json:
        print_json(plan)
        return
    _show_release(plan)


def _show_release(plan: dict[str, Any]) -> None:
    of_tokens = "" if plan["queries"] is None else f", queries {plan['queries']}"
    promise = f"at delta = {plan['delta']:g}, one {plan['unit']}, {_words(plan['relation'])}{of_tokens}"
    rows = [
        ("epsilon of one call", f"{number(plan['epsilon'])} {promise}"),
        (f"epsilon of {plan['calls']} calls", number(plan["total_epsilon"])),
        ("mechanism", f"{plan['mechanism']} ({_words(plan['distribution'])} noise, rows clipped in {plan['norm']})"),
        ("noise multiplier", _noise(plan["noise_multiplier"], given=plan["solved_for"] == "epsilon")),
        ("noise std", "not known" if plan["noise_std"] is None else number(plan["noise_std"])),
        ("sensitivity", f"{number(plan['sensitivity'])} by {plan['theorem']}"),
        ("naive sensitivity", number(plan["sensitivity_naive"])),
    ]
    two_columns("Release", rows if plan["calls"] > 1 else rows[:1] + rows[2:])
    _prices(
        {"one call": plan["epsilons"]} | ({"all calls": plan["total_epsilons"]} if plan["calls"] > 1 else {}),
        plan["no_bound"] | plan["total_no_bound"],
        plan["remarks"],
    )
    ratio = plan["signal_to_noise"]
    two_columns(
        "What is left, and what it takes",
        [
            ("signal / noise of an element", "not known" if ratio is None else f"at most {down(ratio, 3)}"),
            ("saved by sensitivity analysis", _percent(plan["saved_by_sensitivity_percent"])),
            ("saved noise energy", _percent(plan["saved_noise_energy_percent"])),
            ("random numbers of a call", str(plan["noise_draws"])),
            *_memory(plan["memory_bytes"], "what the kernel keeps"),
            ("time", _time(plan["seconds"], "--seconds-per-call")),
        ],
    )
    for sentence in plan["explanation"]:
        answers.print(sentence, style="dim", markup=False, highlight=False, soft_wrap=True)
    if plan["sampler_end_delta"] is None:
        answers.print("The end of the noise sampler is not charged in this plan.", style="dim")
    _end(plan)


def _prices(columns: dict[str, dict[str, float]], reasons: dict[str, str], remarks: list[str]) -> None:
    answers.print()
    side_by_side(columns, reasons, remarks)
    answers.print()


def _noise(noise_multiplier: float, *, given: bool) -> str:
    # what was typed is shown as it was typed; what was found is rounded up
    return f"{noise_multiplier:.12g}" if given else number(noise_multiplier)


def _memory(parts: dict[str, int] | None, without: str) -> list[tuple[str, str]]:
    if parts is None:
        return [("memory", "pass --parameters")]
    listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if name != "total")
    return [("memory", f"{size(parts['total'])} ({listed}) without {without}")]


def _time(seconds: float | str, option: str) -> str:
    return f"not measured (pass {option})" if isinstance(seconds, str) else f"{math.ceil(seconds)} s"


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{down(value, 3)} % of what the naive bound needs"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _end(plan: dict[str, Any]) -> None:
    if plan["plot"]:
        answers.print(f"picture: {plan['plot']}", markup=False, highlight=False, soft_wrap=True)
    warn(plan["warnings"])
