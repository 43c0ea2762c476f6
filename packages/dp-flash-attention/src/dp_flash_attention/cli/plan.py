"""``dpfa plan train`` and ``dpfa plan release``: what noise a promise needs, without touching data."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer
from rich.table import Table

from dp_flash_attention.cli.output import answers, print_json
from dp_flash_attention.numbers import number

app = typer.Typer(help="What noise a promise needs; no data and no tensor is touched.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("train")
def plan_train(
    epsilon: Annotated[float, typer.Option(help="Target epsilon.")],
    delta: Annotated[float, typer.Option(help="Target delta.")],
    records: Annotated[int, typer.Option(help="Number of training records (public).")],
    batch_size: Annotated[int, typer.Option(help="Expected Poisson batch size.")],
    epochs: Annotated[int, typer.Option(help="Epochs of records / batch size steps.")],
    json: Json = False,
) -> None:
    """The noise multiplier of a DP-SGD run, and what every accountant says of it.

    Example: dpfa plan train --epsilon 3 --delta 1e-5 --records 60000 --batch-size 256 --epochs 20
    """
    from dpfa_accounting.calibration import calibrate_noise_multiplier
    from dpfa_core.checks import fraction, integer, positive, require
    from dpfa_core.events import Gaussian, PoissonSampled, SelfComposed
    from dpfa_core.spending import spending

    positive("epsilon", epsilon)
    fraction("delta", delta, zero=False)
    integer("records", records, least=1)
    integer("epochs", epochs, least=1)
    integer("batch-size", batch_size, least=1)
    require(batch_size <= records, f"batch-size must not exceed the {records} records", batch_size)
    steps = epochs * -(-records // batch_size)
    # rounded up, as the training plan does
    probability = min(1.0, math.nextafter(batch_size / records, 2.0))

    def event(noise_multiplier: float) -> Any:
        return SelfComposed(PoissonSampled(probability, Gaussian(noise_multiplier)), steps)

    noise_multiplier = calibrate_noise_multiplier(event, epsilon, delta)
    total = spending(((event(noise_multiplier), 1),), delta)
    _show(
        {
            "noise_multiplier": noise_multiplier,
            "sampling_probability": probability,
            "steps": steps,
            "epsilon": total.epsilon,
            "delta": delta,
            "epsilons": dict(total.by_accountant),
            "unit": "example",
            "relation": "add_or_remove",
        },
        json,
    )


@app.command("release")
def plan_release(
    epsilon: Annotated[float, typer.Option(help="Epsilon of one call.")],
    delta: Annotated[float, typer.Option(help="Delta of one call.")],
    q_len: Annotated[int, typer.Option(help="Query rows of one batch row.")],
    kv_len: Annotated[int | None, typer.Option(help="Keys; default: as many as queries.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 1,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads; default: as query heads.")] = None,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    unit: Annotated[str, typer.Option(help="sequence or token.")] = "sequence",
    relation: Annotated[str, typer.Option(help="replace or add_or_remove.")] = "replace",
    queries: Annotated[str | None, typer.Option(help="public or private; needed for tokens.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Causal mask.")] = False,
    clip_norm: Annotated[float, typer.Option(help="Row clip.")] = 1.0,
    logit_bound: Annotated[float | None, typer.Option(help="Logit bound B; needed for tokens.")] = None,
    mechanism: Annotated[str, typer.Option(help="Name of an installed mechanism.")] = "gaussian",
    json: Json = False,
) -> None:
    """Sensitivity and noise of one private attention call.

    Example: dpfa plan release --epsilon 1 --delta 1e-6 --q-len 128 --unit token --queries private --logit-bound 1
    """
    from dpfa_core.errors import PrivacyParameterError
    from dpfa_core.registry import MECHANISMS
    from dpfa_core.spec import AttentionProblem, PrivacySpec
    from dpfa_mechanisms.sensitivity import sensitivity

    spec = PrivacySpec(
        epsilon=epsilon,
        delta=delta,
        unit=unit,  # type: ignore[arg-type]
        relation=relation,  # type: ignore[arg-type]
        queries=queries,  # type: ignore[arg-type]
    )
    problem = AttentionProblem(
        batch=1,
        q_len=q_len,
        kv_len=kv_len or q_len,
        q_heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        causal=causal,
        clip_norm=clip_norm,
        logit_bound=logit_bound,
    )
    noise = MECHANISMS.create(mechanism)
    reasons = noise.supports(spec, problem)
    if reasons:
        raise PrivacyParameterError(f"mechanism {mechanism!r} cannot do this: {' '.join(reasons)}")
    bound = sensitivity(spec, problem, noise.norm)
    noise_multiplier = noise.calibrate(epsilon, delta)
    plan = noise.plan(bound, (noise_multiplier,), problem)
    _show(
        {
            "noise_multiplier": noise_multiplier,
            "noise_scale": max(plan.head_scale),
            "distribution": plan.distribution,
            "sensitivity": bound.value,
            "sensitivity_naive": bound.naive,
            "theorem": bound.item,
            "norm": bound.norm,
            "epsilon": epsilon,
            "delta": delta,
            "unit": unit,
            "relation": relation,
        },
        json,
    )


def _show(values: dict[str, Any], json: bool) -> None:
    if json:
        print_json(values)
        return
    table = Table(box=None, show_header=False)
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number(item)}" for key, item in value.items())
        table.add_row(name.replace("_", " "), number(value) if isinstance(value, float) else str(value))
    answers.print(table)
