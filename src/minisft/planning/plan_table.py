"""A plan as tables for the terminal and as JSON."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from minisft.console import console, say
from minisft.planning.planner import Plan, needed_bytes
from minisft.planning.prediction import Prediction

_PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "workspace")
_HEADS = ("weights", "grads", "optim.", "activ.", "logits", "buffers", "temp.")


def show_plan(plan: Plan) -> None:
    """Print the plan."""
    job, training = plan.job, plan.recipe.training
    # 1. The model, the machine, the work and the notes.
    cost = job.cost("zero1", training.lora)
    say(
        f"{plan.recipe.model}: {_count(cost.parameters)} parameters, {_count(cost.trainable)} trained, "
        f"{job.precision}"
        + (", gradient checkpointing" if training.gradient_checkpointing else "")
        + (", kernels of Liger" if job.model.liger else "")
    )
    say(
        f"{job.processes} x {job.machine.name} on {job.nodes} node(s), {_gb(job.machine.memory)} GB usable each "
        f"({job.machine.source})"
    )
    work = job.workload
    steps = f"{work.steps:,} steps of " if work.steps else "steps of "
    rows = f"{work.rows:.3g} row(s) a process, the longest of {work.row_tokens.max():,}"
    say(f"{steps}{work.tokens:,.0f} tokens, {rows}")
    for note in plan.notes:
        say(f"note: {note}")
    # 2. The predictions.
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    console.print(_grid_table(plan))
    # 3. The choice, and what would fit.
    say(f"choice: {plan.reason}" if plan.chosen else plan.reason, style="bold")
    for suggestion in plan.suggestions:
        say(f"  would fit: {suggestion}")
    if plan.largest_row:
        mean = float(work.row_tokens.mean())
        say(
            f"largest row that fits: {plan.largest_row:,} tokens (training.row_tokens), which is also the longest "
            "conversation. batch_size costs no memory: the rows of a step, now of a mean length of "
            f"{mean:,.0f} tokens, are computed one after another."
        )
    if any(row.setting.offload for row in plan.rows):
        say("offload: with training.offload=optimizer; it is chosen only where the recipe sets it.")
    if not all(row.fits for row in plan.grid):
        say("* does not fit.")
    # 4. The dry run.
    for line in plan.dry_run.lines() if plan.dry_run else ():
        say(line)


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as `minisft plan --json` prints it."""
    job, cost = plan.job, plan.job.cost("zero1", None)
    return {
        "model": plan.recipe.model,
        "parameters": cost.parameters,
        "machine": {"name": job.machine.name, "processes": job.processes, "nodes": job.nodes,
                    "usable_bytes": round(job.machine.memory), "source": job.machine.source},
        "precision": job.precision,
        "kernels": "liger" if job.model.liger else "none",
        "row_tokens": job.row_tokens,
        "steps": job.workload.steps,
        "tokens_per_step": job.workload.tokens,
        "choice": plan.chosen.setting.strategy if plan.chosen else None,
        "reason": plan.reason,
        "remedies": list(plan.suggestions),
        "largest_row": plan.largest_row,
        "notes": list(plan.notes),
        "strategies": [row.as_json() for row in plan.rows],
        "grid": [row.as_json() for row in plan.grid],
        **({"dry_run": plan.dry_run.as_json()} if plan.dry_run else {}),
    }  # fmt: skip


def _memory_table(plan: Plan) -> Table:
    """Return the memory of each strategy, by its parts."""
    table = Table(title="Memory of the largest process, GB", box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("")
    on_cpu, scores = plan.job.machine.kind == "cpu", plan.job.scored_tokens > 0
    for head in (*_HEADS, *(["scoring"] if scores else []), *(["python"] if on_cpu else []), "peak"):
        table.add_column(head, justify="right")
    for row in plan.rows:
        parts = [_gb(getattr(row.memory, part)) for part in (*_PARTS, *(["scoring"] if scores else []))]
        table.add_row(_label(row), *parts, *([_gb(row.process_bytes)] if on_cpu else []), _peak(row))
    return table


def _time_table(plan: Plan) -> Table:
    """Return the time and the traffic of a step under each strategy, and the time of the run."""
    table = Table(title="A step, and the run", box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("")
    for head in ("compute", "update", "sending", "step", "GB sent", "host GB", "run"):
        table.add_column(head, justify="right")
    for row in plan.rows:
        step = row.step
        table.add_row(
            _label(row), _seconds(step.products), _seconds(step.update + step.offload), _seconds(step.communication),
            _seconds(step.total), _gb(row.traffic_bytes), _gb(row.memory.host) if row.setting.offload else "",
            "?" if row.total_seconds is None else duration(row.total_seconds),
        )  # fmt: skip
    return table


def _grid_table(plan: Plan) -> Table:
    """Return peak memory and step time with and without checkpointing and LoRA."""
    lora = (plan.recipe.training.lora or plan.grid[-1].setting.lora).rank  # type: ignore[union-attr]
    table = Table(
        title="Peak GB / seconds of a step, with and without gradient checkpointing (gc) and LoRA",
        box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("")
    for head in ("full", "full, gc", f"LoRA r={lora}", f"LoRA r={lora}, gc"):
        table.add_column(head, justify="right")
    settings = len(plan.grid) // 4  # strategies, without and with offload
    for index in range(settings):
        cells = plan.grid[index::settings]
        table.add_row(_label(cells[0]), *[_peak(cell) + f" / {_seconds(cell.step.total)}" for cell in cells])
    return table


def _label(row: Prediction) -> str:
    return row.setting.strategy + (" offload" if row.setting.offload else "")


def _peak(row: Prediction) -> str:
    size = _gb(needed_bytes(row))
    return escape(size) if row.fits else f"[red]{size}*[/red]"


def _gb(size: float) -> str:
    if size >= 99.95e9:
        return f"{size / 1e9:.0f}"
    return f"{size / 1e9:.1f}" if size >= 0.95e8 or size == 0 else f"{size / 1e9:.2f}"


def _seconds(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _count(elements: int) -> str:
    return f"{elements / 1e9:.2f}B" if elements >= 1e9 else f"{elements / 1e6:.1f}M"


def duration(seconds: float) -> str:
    """Return seconds as text, in the unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
