"""The tables of `scaling`, and where each scheme ends."""

from __future__ import annotations

from benchmarks.learning.report import markdown

SHOWN = ("1", "4", "16", "64", "256", "1024")
TITLES = {
    "ddp": "DDP",
    "shard_matrices": "DDP, `shard_matrices`",
    "fsdp2": "FSDP2",
    "owners": "*FSDP2, owners: not built*",
}


def report(document: dict) -> str:
    """The Markdown of a results document."""
    parts = [_of_network(network, document) for network in document["networks"]]
    return "\n".join([*parts, _basis(document)])


def _of_network(network: dict, document: dict) -> str:
    head = ["ranks"]
    for title in TITLES.values():
        head += [f"{title}: holds (P), GB", "traffic, GB", "step, s"]
    lines = [head]
    for ranks in SHOWN:
        line = [ranks]
        for scheme in TITLES:
            row = network["ranks"][scheme][ranks]
            steps = [sum(s.values()) - s["training"] for s in row["seconds"].values()]
            line += [
                f"{_gb(row['held'])} ({_gb(row['matrices'])})",
                _gb(row["traffic"]),
                " / ".join(f"{seconds:.3g}" for seconds in steps),
            ]
        lines.append(line)
    head = (
        f"**{network['network']}**: {network['parameters']:,} parameters, "
        f"{network['layers']} layers with a `P`; {network['minibatch']} "
        "a rank.\n\n"
    )
    return head + markdown(lines) + "\n" + "".join(f"- {x}.\n" for x in _ends(network, document))


def _ends(network: dict, document: dict) -> list[str]:
    ends, memory = network["ends"], document["memory"]
    machines = list(document["speeds"])

    def each(name: str, shown) -> str:
        return " / ".join(shown(ends[machine][name]) for machine in machines)

    kind = "an assumed" if memory["assumed"] else "this machine's"
    above = "above" if ends["replicated_above_share_from"] else "within"
    return [
        f"On one process layers of one input share a `P`, which takes "
        f"{_gb(ends['matrices_of_one_process'])} GB. On several, replicated, it takes "
        f"{_percent(ends['replicated_share_of_memory'])} of {kind} "
        f"{memory['bytes'] / 1e9:.0f} GB, {above} 10 % at any number of ranks; 10 % is that of "
        f"{_gb(ends['memory_of_which_it_is_the_share'])} GB. Under FSDP2 it is most of what a rank "
        f"holds {_from(ends['replicated_half_of_held_from'])}",
        f"With `shard_matrices` it is within 10 % {_from(ends['owned_within_share_from'])}; the "
        f"largest `P`, {_gb(ends['largest_matrix'])} GB, is the floor "
        f"{_from(ends['largest_is_the_floor_from'])}; owners broadcast what they have "
        f"moved, every weight once, up to {_gb(ends['owned_broadcast_at_once_most'])} GB at once",
        f"Products with `P` are {each('product_share_replicated', _percent)} of forward, "
        f"backward and step under DDP, about so at any number of ranks, and 5 % with "
        f"{each('minibatches_within_share', '{:.3g}'.format)} times the minibatch; by rows they "
        f"are within 5 % {each('by_rows_within_share_from', _from)}, with `shard_matrices` "
        f"{each('by_owners_within_share_from', _from)}",
        f"What is exchanged of the inputs is {_percent(ends['exchange_over_gradient'])} of the "
        f"gradient's traffic. Borders cut blocks of rows {_from(ends['rows_exchanged_from'])}: "
        f"then ranks exchange the rows that their blocks lack. The one that has most of that "
        f"takes or gives {_gb(ends['rows_exchanged_most'])} GB a step, at most: "
        f"{_percent(ends['rows_exchanged_most'] / ends['weights'])} of all weights, and "
        f"{_gb(ends['rows_exchanged_at_once_most'])} GB at once",
    ]


def _basis(document: dict) -> str:
    machine, trainings = document["environment"], document["trainings"]
    step, reduced = document["step"], document["all_reduce"]
    sizes = sorted({t["ranks"] for t in trainings})
    speeds = "; ".join(
        f"{name}: products with `P` {s['product'] / 1e9:.3g} GFLOP/s, directions "
        f"{s['direction'] / 1e9:.3g}, forward and backward {s['training'] / 1e9:.3g}; updates of "
        f"`P` {s['update'] / 1e9:.3g} GB/s, other passes {s['passes'] / 1e9:.3g}; sending "
        f"{s['link'] / 1e9:.3g} GB/s after {1e6 * s['latency']:.3g} µs"
        for name, s in document["speeds"].items()
    )
    return (
        f"Float32, {' / '.join(document['speeds'])} speeds. {len(trainings)} trainings by "
        f"{', '.join(map(str, sizes))} processes called what was computed of them, call by call "
        "and byte by byte, and every rank's state had the bytes. Steps are the optimizer's alone; "
        "traffic is what a rank sends or takes, whichever is more. "
        f"A real one of ResNet-50 took {step['measured']:.3g} s, computed "
        f"{step['computed']:.3g} s; an all-reduce of {reduced['bytes'] >> 20} MiB by "
        f"{reduced['ranks']} processes {1e3 * reduced['measured']:.3g} ms, computed "
        f"{1e3 * reduced['computed']:.3g} ms. Speeds, {speeds}. "
        f"{machine['cpu']}, {machine['cores']} cores, one thread a process, gloo on loopback, load "
        f"{machine['load_at_start']} at the start; torch {machine['torch']}; kernels "
        f"{machine['source_hash']}; {machine['started'][:10]}."
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _from(ranks: int | None) -> str:
    return "at no number of ranks" if ranks is None else f"from {ranks} on"
