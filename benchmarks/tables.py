"""Markdown tables of benchmarks/results/*.json, printed or written into the pages that show them.

    python -m benchmarks.tables              # every result there is
    python -m benchmarks.tables rls_update   # one
    python -m benchmarks.tables --pages      # README.md and all of docs/, between markers, in place

The markers of a table are `<!-- table:NAME -->` and `<!-- /table -->`. NAME.cuda is the table of
the same benchmark on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks import headline, scaling_width
from benchmarks.architectures import table as architectures
from benchmarks.common import environment, shapes
from benchmarks.distributed import report as distributed
from benchmarks.learning import long_runs
from benchmarks.learning import report as learning
from benchmarks.pruning import (
    adaptive,
    blocks,
    gates,
    plots,
    pretraining,
    relief,
    scopes,
    transformers,
)
from benchmarks.static_gpu import report as static

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = environment.ROOT / "docs"
NO_TABLE = "alike"  # says which sources the other results hold for
MARKED = re.compile(r"(<!-- table:([\w.]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet.\n"
LIBRARIES = ("torch_pruning", "torchvision", "timm", "transformers")
GRIDS = {  # of many training runs
    "quality": learning.report,
    "long_runs": long_runs.report,
    "pruning": plots.report,
    "scopes": scopes.report,
    "blocks": blocks.report,
    "gates": gates.report,
    "pretraining": pretraining.report,
    "relief": relief.report,
    "adaptive": adaptive.report,
    "architectures": architectures.report,
    "transformers": transformers.report,
}


def markdown(rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A GitHub table; the first row is its header, all but the first columns of texts set right."""
    rule = [*["---"] * texts, *["---:"] * (len(rows[0]) - texts)]
    lines = [rows[0], rule, *rows[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def ratio_cell(record: dict, pair: str) -> str:
    """`0.48`, `0.48 / 0.52` where best times say otherwise, with the target where there is one."""
    ratio = record["ratios"].get(pair)
    if ratio is None:
        return ""
    text = f"{ratio['median']:.3g}"
    if abs(ratio["best"] / ratio["median"] - 1) > 0.05:
        text += f" / {ratio['best']:.3g}"
    if "target" not in ratio:
        return text
    if ratio["median"] > ratio["target"]:
        text = f"**{text}**"
    return f"{text} (≤ {ratio['target']:g})"


def microseconds(record: dict, lane: str) -> str:
    """The best time of a lane, in a unit that reads well."""
    if lane not in record["microseconds"]:
        return ""
    value = record["microseconds"][lane]["best"]
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} µs"


def ordered(items: Iterable[str]) -> list[str]:
    """Without repetition, in order of first appearance."""
    return list(dict.fromkeys(items))


def by_ratio(document: dict) -> str:
    """One row a case: the best time of our lane, then every ratio."""
    records = document["cases"]
    pairs = ordered(pair for r in records for pair in r["ratios"])
    ours = next(iter(records[0]["microseconds"]))
    rows = [["case", ours, *pairs]]
    for r in records:
        rows.append([r["case"], microseconds(r, ours), *(ratio_cell(r, pair) for pair in pairs)])
    return markdown(rows)


def training_step(document: dict) -> str:
    """One row an optimizer, one column a model: the step as a multiple of fused Adam's."""
    records = document["cases"]
    rows = [["one training step / fused Adam's", *(r["case"] for r in records)]]
    for lane in records[0]["microseconds"]:
        cells = [ratio_cell(r, f"{lane} / {shapes.BASELINE}") for r in records]
        if lane == shapes.BASELINE:
            cells = [f"1 ({microseconds(r, lane)})" for r in records]
        rows.append([lane, *cells])
    return markdown(rows)


def small_layers(document: dict) -> str:
    """One row an optimizer: its step, and what it adds to forward and backward, a layer."""
    (record,) = document["cases"]
    plain, *lanes = record["microseconds"]
    least = record["microseconds"][plain]["best"]
    rows = [[record["case"], "a training step", f"/ {plain}", "added, a layer"]]
    rows.append([plain, microseconds(record, plain), "1", ""])
    for lane in lanes:
        added = (record["microseconds"][lane]["best"] - least) / record["facts"]["layers"]
        rows.append([lane, microseconds(record, lane), ratio_cell(record, f"{lane} / {plain}"),
                     f"{added:.3g} µs"])  # fmt: skip
    return markdown(rows)


def soak(document: dict) -> str:
    """One row a run: how far the resident memory grew."""
    rows = [["network", "optimizer", "steps", "memory grew by"]]
    for r in document["rows"]:
        grown = f"{r['growth_mib']:.1f} MiB"
        rows.append([r["network"], r["optimizer"], f"{r['steps']:,}", grown])
    return markdown(rows) + staleness({document["environment"]["source_hash"]}, of="trains")


def endurance(document: dict) -> str:
    """One row a run: what is left of its loss and its weights, and the resets of its `P`."""
    rows = [["task", "form", "steps", "last loss", "largest weight", "resets"]]
    for r in document["rows"]:
        figures = [f"{r['loss']:.3g}", f"{r['largest_weight']:.3g}", str(r["resets"])]
        rows.append([r["task"], r["form"], f"{r['steps']:,}", *figures])
    return markdown(rows) + staleness({document["environment"]["source_hash"]}, of="trains")


def filter_windup(document: dict) -> str:
    """By input and λ the worst of ours, and forgetting without a ridge; then the noise floor."""
    rows = [[
        "input, λ", "NaNs, resets", "largest eigenvalue of P / its bound", "error at the end",
        "`ridge=0`: resets", "largest eigenvalue", "padasip: first NaN",
    ]]  # fmt: skip
    for plain in document["textbook"]:
        place = (plain["kind"], plain["forgetting"])
        ours = [r for r in document["windup"] if (r["kind"], r["forgetting"]) == place]
        errors = [r["error"] for r in ours if r["error"] is not None]
        first = plain["padasip_first_nan"]
        rows.append([
            "{}, {:g}".format(*place),
            ", ".join(str(sum(r[count] for r in ours)) for count in ("nans", "resets")),
            f"{max(r['largest'] / r['bound'] for r in ours):.2f}",
            f"{max(errors):.0e}" if errors else "", f"{plain['resets']:,}",
            f"{plain['largest']:.0e}", "none" if first is None else f"sample {first:,}",
        ])  # fmt: skip
    floors = [["n, λ", "default", "float32", "`ridge=0`", "theory"]]
    for r in document["noise_floor"]:
        figures = [f"{r[name]:.4f}" for name in ("default", "float32", "ridge=0", "theory")]
        floors.append([f"{r['n']}, {r['forgetting']:g}", *figures])
    text = f"{markdown(rows)}\nThe noise floor of white inputs:\n\n{markdown(floors)}"
    return text + staleness({document["environment"]["source_hash"]}, name="filter_windup")


def filter_numerics(document: dict) -> str:
    """One row a series, one column a form of the filter, and the peer."""
    names = [key for key in document["rows"][0] if key not in ("case", "dtype", "initial_scale")]
    rows = [["inputs", "dtype, δ", *names]]
    for r in document["rows"]:
        setting = f"{r['dtype']}, {r['initial_scale']:.0e}"
        rows.append([r["case"], setting, *(f"{r[name]:.2g}" for name in names)])
    stale = staleness({document["environment"]["source_hash"]}, name="filter_numerics")
    return markdown(rows) + stale


def scaling(document: dict) -> str:
    """Bytes, traffic and time of a step by the number of processes."""
    return distributed.report(document) + staleness(
        {document["environment"]["source_hash"]}, of="trains"
    )


def width(document: dict) -> str:
    """Time and memory of a step by width, depth, batch and rank."""
    stale = staleness({document["environment"]["source_hash"]}, name="scaling_width")
    return scaling_width.report(document) + stale


def provenance(document: dict) -> str:
    """Where, when and with what a result was measured, and whether it still holds."""
    machine, versions, ceilings = (document[k] for k in ("machine", "versions", "ceilings"))
    library = ", ".join(f"{name} {version}" for name, version in versions.items())
    where = machine.get("gpu")
    if not document["name"].endswith(".cuda"):
        where = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, SIMD level "
            f"{machine['simd']}, load {machine['load_at_start']} at the start"
        )
    text = (
        f"{where}; copy {ceilings['copy_gb_s']:.3g} GB/s, float32 GEMM "
        f"{ceilings['gemm_gflop_s']:.3g} GFLOP/s; {library}; kernels {document['source_hash']}; "
        f"{document['date'][:10]}."
    )
    of = "all" if document["name"].endswith(".cuda") else "times"
    return text + staleness({document["source_hash"]}, of, document["name"])


def staleness(hashes: set[str], of: str = "times", name: str = "") -> str:
    """A warning where results are of other kernel sources than the tree's.

    Args:
        hashes: Of the sources of the results.
        of: What must not have changed, see `environment.alike`.
        name: Of the results.
    """
    if hashes <= environment.alike(of, name):
        return ""
    return f" **Stale: the kernel sources have changed since, to {environment.tree_hash()}.**"


def grid_provenance(document: dict) -> str:
    """Where, when and with what a grid was made; versions are those of its last sitting."""
    sittings = document["environments"]
    hashes = {sitting["source_hash"] for sitting in sittings}
    machine, names = sittings[-1], " and ".join(dict.fromkeys(s["cpu"] for s in sittings))
    library = ", ".join(
        f"{name} {machine[name]}" for name in (*environment.versions(), *LIBRARIES)
        if name in machine
    )  # fmt: skip
    text = (
        f"{len(document['runs'])} runs on {names}, {machine['cores']} cores, one thread a "
        f"run; {library}; kernels {', '.join(sorted(hashes))}; {machine['started'][:10]}."
    )
    return text + staleness(hashes, of="trains")


def static_gpu(document: dict) -> str:
    """What the machine code of the kernels says, and the times predicted from it."""
    return static.report(document) + staleness({document["source_hash"]}, of="all")


RUNS = {  # not of a race, nor a grid
    "soak": soak,
    "endurance": endurance,
    "scaling": scaling,
    "scaling_width": width,
    "filter_windup": filter_windup,
    "filter_numerics": filter_numerics,
    "static_gpu": static_gpu,
}

SUMMARIES = {"headline": (headline.headline, 1), "systems": (headline.systems, 4)}  # of several


def render(name: str, results: Path) -> str:
    """The table of one result, or a line that says it is not measured yet.

    Raises:
        ValueError: The result was written in another schema.
    """
    if name in SUMMARIES:
        rows, texts = SUMMARIES[name]
        return markdown(rows(results), texts)
    path = results / f"{name}.json"
    if not path.is_file():
        return NOT_MEASURED
    document = json.loads(path.read_text(encoding="utf-8"))
    if name in GRIDS:
        return f"{GRIDS[name](path).rstrip()}\n\n{grid_provenance(document)}\n"
    if name in RUNS:
        return f"{RUNS[name](document)}\n"
    if document.get("schema") != shapes.SCHEMA:
        raise ValueError(f"{path} must have schema {shapes.SCHEMA}, got {document.get('schema')}")
    layouts = {"training_step": training_step, "small_layers": small_layers}
    layout: Callable[[dict], str] = layouts.get(name.removesuffix(".cuda"), by_ratio)
    return f"{layout(document)}\n{provenance(document)}\n"


def measured(results: Path) -> list[str]:
    """The names of all results, in order."""
    return sorted(p.stem for p in results.glob("*.json") if p.stem != NO_TABLE)


def pages() -> Iterator[Path]:
    """Every page with marked tables."""
    for path in (environment.ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        built = any(part.startswith("_") for part in path.relative_to(environment.ROOT).parts)
        if not built and MARKED.search(path.read_text(encoding="utf-8")):
            yield path


def filled(text: str, results: Path) -> str:
    """A page with what the results give between its markers."""
    return MARKED.sub(lambda m: f"{m[1]}\n{render(m[2], results)}\n{m[3]}", text)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables of the named results, or of all; with --pages writes those of all pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="stems such as rls_update; all there are if none")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pages", action="store_true", help="write marked tables in place")
    args = parser.parse_args(argv)
    if args.pages:
        for page in pages():
            text = page.read_text(encoding="utf-8")
            page.write_text(filled(text, args.results), encoding="utf-8")
            names = (found[1] for found in MARKED.findall(text))
            print(f"{page.relative_to(environment.ROOT)}: {', '.join(names)}")
        return
    for name in args.names or measured(args.results):
        print(f"### {name}\n\n{render(name, args.results)}")
    if not any(args.results.glob("*.cuda.json")):
        print(f"### On a GPU\n\n{NOT_MEASURED}")


if __name__ == "__main__":
    main()
