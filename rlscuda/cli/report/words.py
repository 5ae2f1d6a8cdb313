"""What a report says in words and numbers, the same on the page and the terminal."""

from __future__ import annotations

from rlscuda.cli.report.record import PruneRecord
from rlscuda.pruning.running.measure import scaled

Rows = list[tuple[str, ...]]
_IMPORTANCES = {
    "saliency": "saliency from P",
    "l1": "L1 magnitude",
    "l2": "L2 magnitude",
    "taylor": "Taylor expansion",
    "bn_scale": "batch-norm scale",
    "random": "chance",
}
_SOURCES = {
    "own": "the optimizer's own P",
    "sketch": "a sketch tracked beside the training",
    "calibration": "a calibration on the training images",
}


def headline(record: PruneRecord) -> str:
    """What was done to what."""
    count = len(branches_of(record))
    branches = f"{count} residual branch{'es' * (count != 1)}"
    if not record.widths:
        return f"{record.title}: {branches} removed"
    branches = f" and {branches}" if count else ""
    return f"{record.title}: {100 * record.ratio:.1f} % of its channels{branches} removed"


def subtitle(record: PruneRecord) -> str:
    """How it was done, in a line."""
    report, count = record.last_report, len(record.rounds)
    rounds = "one round" if count == 1 else f"{count} rounds"
    if count < record.planned:
        rounds = f"{count} of {record.planned} rounds"
    importance = report["importance"]
    text = f"{rounds}, chosen by {_IMPORTANCES.get(importance, importance)}"
    text += f" ({report['selection']})"
    if source := source_of(record):
        text += f", matrices: {source}"
    if branches := branches_of(record):
        text += f"; branches: {', '.join(branches)}"
    return text if record.compensate else text + ", nothing compensated"


def branches_of(record: PruneRecord) -> list[str]:
    """The residual branches that went, each with what it became."""
    blocks = [block for report in record.standing for block in report.get("blocks", [])]
    return [f"{b['name']} ({'deleted' if b['how'] == 'delete' else b['how']})" for b in blocks]


def source_of(record: PruneRecord) -> str | None:
    """Where the matrices came from; None where there were none."""
    source = record.last_report["source"]
    return None if source == "none" else _SOURCES.get(source, source)


def percent(value: float | None) -> str:
    """A share in [0, 1] as percent, with two digits; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.2f} %"


def times(ratio: float, over: str = "smaller", under: str = "larger") -> str:
    """How many times smaller, or larger where it grew."""
    if 0.995 <= ratio <= 1.005:
        return "the same"
    value, word = (ratio, over) if ratio > 1 else (1 / ratio, under)
    return f"{value:.{2 if value < 2 else 1}f}× {word}"


def stage_table(record: PruneRecord) -> tuple[tuple[str, ...], Rows]:
    """The head and the rows of the table of stages; what is tested has a column more."""
    tested = any(stage.test_accuracy is not None for stage in record.stages)
    head = ("parameters", "validation loss", "validation accuracy", *["test accuracy"] * tested)
    rows = []
    for stage in record.stages:
        name = stage.label if len(record.rounds) > 1 else stage.kind
        seen = (f"{stage.parameters:,}", f"{stage.val_loss:.4f}", percent(stage.val_accuracy))
        rows.append((name, *seen, *[percent(stage.test_accuracy)] * tested))
    return head, rows


def gain_rows(record: PruneRecord) -> Rows:
    """The table of gains: quantity, of the whole network, of the final one, how much less."""
    before, after, ratios = record.gains.before, record.gains.after, record.gains.ratios
    batch = before.batch_size
    images = "one image" if batch == 1 else f"{batch} images"
    return [
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}",
         times(ratios["parameters"], "fewer", "more")),
        ("FLOPs an image", scaled(before.flops / batch, "", 1000),
         scaled(after.flops / batch, "", 1000), times(ratios["flops"], "fewer", "more")),
        (f"peak memory, {images}", scaled(before.peak_memory_bytes, "B", 1024),
         scaled(after.peak_memory_bytes, "B", 1024), times(ratios["peak_memory_bytes"])),
        (f"latency, {images}", scaled(before.latency_seconds, "s", 1000),
         scaled(after.latency_seconds, "s", 1000),
         times(ratios["latency_seconds"], "faster", "slower")),
    ]  # fmt: skip


def caption_of_gains(record: PruneRecord) -> str:
    """On what the gains were measured."""
    before = record.gains.before
    return f"one forward without gradients, {before.batch_size} images, on {before.device}"


def disagreement_rows(record: PruneRecord) -> Rows:
    """How far each layer's matrix is from a calibration, where one was made."""
    found = record.last_report["disagreement"] or {}
    return [(name, f"{value:.3g}") for name, value in found.items()]


def tiles(record: PruneRecord) -> Rows:
    """The four numbers that one looks for first: name, value, remark."""
    first, last, whole = record.stages[0], record.stages[-1], record.gains.before
    parameters, flops, _, latency = gain_rows(record)
    tested = first.test_accuracy is not None and last.test_accuracy is not None
    kind = "test" if tested else "validation"
    before, after = (s.test_accuracy if tested else s.val_accuracy for s in (first, last))
    change = f"{100 * ((after or 0.0) - (before or 0.0)):+.2f}".replace("-", "−")
    return [
        (f"{kind} accuracy", percent(after), f"{percent(before)} whole, {change} points"),
        ("parameters", parameters[3], f"{parameters[1]} → {parameters[2]}"),
        ("FLOPs", flops[3], f"{flops[2]} an image"),
        ("latency", latency[3], f"{whole.batch_size} images, {whole.device}"),
    ]


def round_rows(record: PruneRecord) -> Rows:
    """Number, outcome, share gone, epochs since and last validation loss of each round."""
    rows: Rows = []
    for number, done in enumerate(record.rounds, 1):
        losses = done["losses"]
        last = f"{losses[-1]:.4f}" if losses else "–"
        rows.append((str(number), done["outcome"], percent(done["ratio"]), str(len(losses)), last))
    return rows


def width_rows(record: PruneRecord) -> Rows:
    """Name, units before, after, share removed and cost of each coupling."""
    return [
        (width.name, f"{width.before:,}", f"{width.after:,}",
         percent(1 - width.after / width.before), f"{record.spent(width.name):.3g}")
        for width in record.widths
    ]  # fmt: skip


def gate_rows(record: PruneRecord) -> Rows:
    """Name, probability, worth, price and end of each gate, where there were any."""
    return [
        (gate["name"], *(f"{gate[key]:.3g}" for key in ("theta", "worth", "price")),
         "stays" if gate["state"] == "on" else "removed")
        for gate in record.last_report.get("gates", [])
    ]  # fmt: skip


def exception_rows(record: PruneRecord) -> Rows:
    """What could not be pruned, or not be compensated, and why."""
    reasons: dict[tuple[str, str], str] = {}
    for report in (entry["report"] for entry in record.rounds):
        for key, kind in (("refused", "not pruned"), ("uncompensated", "not compensated")):
            reasons |= {(name, kind): reason for name, reason in report[key].items()}
    return [(*key, reason) for key, reason in reasons.items()]
