"""Makes the tables of measured figures in the documents, from what the benchmarks have written.

    python docs/figures/tables.py            # puts them into the documents
    python docs/figures/tables.py --check    # changes nothing; exit 1 if one is not as it should be

What
    The files beside this one are what ``--json`` of a benchmark has written: ``SOURCES`` says which
    command each is of. ``TABLES`` has a function for each table. In a document a table stands
    between two lines, ``<!-- figures: NAME -->`` and ``<!-- end -->``; what is between them is
    written anew, with the command, the version and the date that the figures are of.

How it works
    A cell for which the file has no figure stays empty. The tests compare (test_figures.py), so
    that neither a table that was edited by hand nor one of older figures stays.

Lifetime
    A file is measured anew by its command (benchmarks/README.md lists them), and then this is run.

When it cannot
    A file of another command than its own, and a table that nobody knows, are errors.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parents[1]

#: The command of each file. In benchmarks/README.md stands how long each takes.
SOURCES = {
    "transfer": "python benchmarks/transfer.py --check",
    "joblib": "python benchmarks/with_joblib.py",
    "sharing": "python benchmarks/sharing.py --passes 12",
    "merging": "python benchmarks/merging.py --quick --passes 7",
    "broadcasting": "python benchmarks/broadcasting.py --nbytes 2.56e8 --passes 5",
    "broadcast-memory": "python benchmarks/broadcasting.py --nbytes 1e9 --memory --check",
    "spilling": "python benchmarks/spilling.py --folder /var/tmp --passes 7 --check",
    "many-small": "python benchmarks/many_small.py",
    "forking": "python benchmarks/forking.py",
    "steps": "python benchmarks/steps.py",
    "steps-before-the-core": "python benchmarks/steps.py",
    "scaling": "python benchmarks/scaling.py",
    "peers": "python benchmarks/peers.py",
    "soak-1": "python benchmarks/soak.py --minutes 10 --seed 1",
    "soak-2": "python benchmarks/soak.py --minutes 10 --seed 2",
}
#: Files of a version that is gone: they are kept as they are, and no command makes them again.
KEPT = {"steps-before-the-core"}
#: Folders for the plots that a command draws beside its figures.
PLOTS = {"scaling": "docs/explanation/images", "peers": "docs/explanation/images"}

_MARKED = re.compile(r"^<!-- figures: (\S+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
_MIB, _GB = 1 << 20, 1e9

Figures = dict[str, Any]


def load(name: str) -> Figures:
    """Return a file of figures; raise `ValueError` if it is of another command than its own."""
    found: Figures = json.loads((FOLDER / f"{name}.json").read_text())
    if found["command"] != SOURCES[name]:
        raise ValueError(f"{name}.json is of {found['command']!r}, expected {SOURCES[name]!r}")
    return found


# --- words


def three(number: float) -> str:
    """A number with three significant digits and no exponent."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"


def seconds(duration_s: float) -> str:
    """A duration with three significant digits and its unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if float(f"{duration_s * factor:.3g}") >= 1:
            return f"{three(duration_s * factor)} {unit}"
    return f"{three(duration_s * 1e6)} us"


def cell(row: Figures, name: str, write: Callable[[Any], str] = three) -> str:
    """A figure as text; nothing if there is none."""
    return write(row[name]) if row.get(name) is not None else ""


def quartiles(row: Figures, name: str, unit: str = "", write: Callable[[Any], str] = three) -> str:
    """Both quartiles as text; nothing if there are none."""
    ends = [cell(row, f"{name}_{end}{unit}", write) for end in ("first", "third")]
    return " to ".join(ends) if all(ends) else ""


def source(figures: Figures) -> str:
    """Of what the figures are, as a sentence or two."""
    machine = figures["machine"]
    commit = f" ({figures['commit']})" if figures["commit"] else ""
    version = f"{figures['version']}{commit}"
    place = [
        f"{machine['cores']} cores" if machine.get("cores") else "",
        *(str(machine.get(name) or "") for name in ("processor", "memory", "kernel")),
        f"CPython {machine['python']}" if machine.get("python") else "",
        f"NumPy {machine['numpy']}" if machine.get("numpy") else "",
        *(f"{name} {library}" for name, library in figures["libraries"].items()),
        f"system load {machine['load']} at the start" if machine.get("load") is not None else "",
    ]
    first = f"`{figures['command']}`, oobpickle {version}, {figures['date']}"
    text = f"{first}; {', '.join(filter(None, place))}."
    return f"{text} {figures['note']}" if figures["note"] else text


def stamp(figures: Figures) -> str:
    """What a plot that was drawn in the same run says of itself."""
    version = f"oobpickle {figures['version']} ({figures['commit']})"
    return f"{figures['command']}, {version}, {figures['date']}"


def grid(head: Iterable[str], rows: Iterable[Iterable[str]], right: int = 0) -> str:
    """A table in Markdown; the last `right` columns are numbers."""
    head = list(head)
    ends = ["---"] * (len(head) - right) + ["---:"] * right
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ends, *map(list, rows)])


def paragraph(text: str) -> str:
    """A text in lines of the usual length."""
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def listed(figures: Figures, table: str) -> str:
    """A table with what it is of."""
    return f"{paragraph(source(figures))}\n\n{table}"


# --- transfer.py


def speed() -> str:
    figures = load("transfer")
    rows = figures["rows"]
    sizes = {"192K": "192 KiB", "1M": "1 MiB", "64M": "64 MiB", "1G": "1 GiB"}
    times = [f"{_two(rows[f'result-{name}']['times_plain'])} at {sizes[name]}" for name in sizes]
    times[0] = times[0].replace(" at ", " times as fast at ")
    first = f"{_two(rows['result-first-1G']['times_plain'])} for the first message, of 1 GiB"
    first += ", before any memory is ready"
    return paragraph(f"{', '.join(times)}; {first}. {source({**figures, 'note': ''})}")


def _two(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"


def in_short() -> str:
    rows = load("transfer")["rows"]
    small = [rows[f"result-{n}K"]["times_plain"] for n in (1, 4, 16, 32, 64, 96)]
    names = {
        "128K": "128 KiB, where it begins",
        "192K": "192 KiB",
        "1M": "1 MiB",
        "16M": "16 MiB",
        "64M": "64 MiB",
        "256M": "256 MiB",
        "1G": "1 GiB",
        "first-1G": "a first 1 GiB, nothing warm",
    }
    lines = [["up to 96 KiB", f"{min(small):.2f} to {max(small):.2f}", ""]]
    for name, text in names.items():
        row = rows[f"result-{name}"]
        lines.append([text, cell(row, "times_plain", _two), cell(row, "of_copy", _two)])
    return grid(["result", "times plain", "of `np.copyto`"], lines, right=2)


def _transfer_rows(rows: Figures) -> Iterator[list[str]]:
    for name, row in rows.items():
        times = [
            cell(row, "plain_s", seconds) or cell(row, "plain_nbytes", _grown),
            cell(row, "ours_s", seconds) or cell(row, "ours_nbytes", _grown),
            cell(row, "copy_s", seconds),
        ]
        ratios = [cell(row, f"{what}{end}") for what in ("times_plain", "of_copy") for end in _ENDS]
        others = cell(row, "n_cores_others", "{:.2f}".format)
        yield [name, *times, *ratios, others, cell(row, "verdict", str)]


_ENDS = ("", "_read")


def _grown(nbytes: float) -> str:
    return f"+{nbytes / _MIB:.1f} MiB"


def _transfer(kinds: Container[str]) -> str:
    """The rows of some kinds: what their names begin with."""
    figures = load("transfer")
    rows = {name: row for name, row in figures["rows"].items() if name.partition("-")[0] in kinds}
    head = [
        *("row", "plain", "oobpickle", "`np.copyto`", "times plain", "and read"),
        *("of `np.copyto`", "and read", "other cores", "verdict"),
    ]
    return listed(figures, grid(head, _transfer_rows(rows)))


def transfer_results() -> str:
    return _transfer(["result"])


def transfer() -> str:
    return _transfer(["argument", "pickling"])  # that of `acquire` is in steps.py, too


_KINDS = {
    "kind-strided-256M": "every second element of an array, 256 MiB arrive",
    "kind-masked-256M": "masked array, 256 MiB and its mask",
    "kind-bytes-256M": "`bytes`, 256 MiB",
    "kind-frame-800M": "data frame, 800 MiB: floats, integers, booleans, times, categories, "
    "Arrow strings",
    "kind-frame-objects": "data frame with a column of Python strings",
    "kind-integers-5e6": "list of five million integers",
}


def kinds() -> str:
    figures = load("transfer")
    lines = [
        [
            text,
            *(cell(row, name, seconds) for name in ("plain_s", "ours_s")),
            *(cell(row, name) for name in ("times_plain", "of_copy")),
            row.get("wanted", ""),
        ]
        for name, text in _KINDS.items()
        if (row := figures["rows"].get(name))
    ]
    head = ["object", "plain", "oobpickle", "times plain", "of `np.copyto`", "wanted"]
    return listed(figures, grid(head, lines))


# --- the smaller ones

_WITH_JOBLIB = {
    "result-64M": "a result of 64 MB, `Parallel(n_jobs=2)`",
    "argument-64M": "an argument of 64 MB, `max_nbytes=None`",
    "generator-60x64M": '60 results of 64 MB, `return_as="generator"`',
    "small-tasks": "2,000 small tasks",
}
_SHARING = {
    "lock": "the lock alone, nobody else wants it",
    "reading array": "`reading()` of an array",
    "writing array": "`writing()` of an array",
    "writing dict": "`writing()` of a dict of four arrays",
    "4 x lock": "the lock alone, 4 processes want it all the time",
    "4 x writing": "`writing()` of an array, 4 processes",
}


def _ratios(name: str, texts: dict[str, str], head: list[str], *times: str) -> str:
    """A line for each row: how many times as fast, its quartiles, and durations."""
    rows = load(name)["rows"]
    lines = [
        [
            text,
            cell(rows[row], "ratio"),
            quartiles(rows[row], "ratio"),
            *(cell(rows[row], time, seconds) for time in times),
        ]
        for row, text in texts.items()
    ]
    return listed(load(name), grid(["what", *head], lines))


def with_joblib() -> str:
    return _ratios("joblib", _WITH_JOBLIB, ["times plain", "quartiles", "ours"], "ours_s")


def sharing() -> str:
    return _ratios("sharing", _SHARING, ["times `Lock`", "quartiles"])


_SPILLING = {"written": "`os.write`", "spilled": "results, with `enabled(spill_dir=...)`"}


def spilling() -> str:
    figures = load("spilling")

    def cells(row: str, unit: float) -> Iterator[str]:
        for name in ("rate", "synced"):
            found, write = figures["rows"][row], lambda number: three(number / unit)
            yield f"{cell(found, name, write)} ({quartiles(found, name, write=write)})"

    lines = [[text, *cells(row, 1e6)] for row, text in _SPILLING.items()]
    lines.append(["ratio", *cells("ratio", 1)])
    head = ["written to the disk, MB/s", "until it is written", "with `fdatasync`"]
    return listed(figures, grid(head, lines, right=2))


_MERGING = {
    "models-16x64M once": "16 models of 64 MB, as a program does it once",
    "models-16x64M again": "the same again, with the memory that is there by then",
    "counters-16x1M once": "16 `Counter`s of 100,000 keys, once",
}


def merging() -> str:
    figures = load("merging")

    def cells(name: str) -> Iterator[str]:
        for other in ("reduce", "reduce-plain"):
            row = figures["rows"][f"{name} over {other}"]
            yield f"{cell(row, 'ratio')} ({quartiles(row, 'ratio')})"
            if other == "reduce":
                yield cell(row, "most") if "most" in row else ""

    lines = [[text, *cells(name)] for name, text in _MERGING.items()]
    head = ["what", "times `reduce` with oobpickle", "estimate, if nobody waits"]
    head.append("times `reduce`, plain")
    return listed(figures, grid(head, lines))


_BROADCASTING = {
    "hundred-tasks": "100 tasks that each read one hundredth, stored before",
    "slices": "16 slices of a read-only array as arguments",
    "each-reads-all": "stored anew, each worker reads all",
    "arrival": "an arrival",
    "fork": "a fork that inherits a view",
    "first read": "the first read of what has arrived",
    "later read": "a later read of it",
    "drop": "its end",
    "copy": "a copy of as many bytes",
}


def broadcasting() -> str:
    figures = load("broadcasting")
    sides = {"oobpickle": "`broadcast`", "plain": "plain", "ray": "Ray"}
    rows = figures["rows"]
    names = [name for name in sides if any(f"{name}_s" in row for row in rows.values())]

    def text_of(row: Figures, name: str) -> str:
        ends = quartiles(row, name, "_s", seconds)
        return cell(row, f"{name}_s", seconds) + (f" ({ends})" if ends else "")

    lines = [
        [text, *(text_of(rows[row], name) for name in names)]
        for row, text in _BROADCASTING.items()
        if row in rows
    ]
    return listed(figures, grid(["what", *(sides[name] for name in names)], lines))


_BROADCAST_MEMORY = {
    "beside": "what comes on top of the array when it is stored and four workers have read it",
    "in_all": "what there is when the original is gone",
    "copied_read_only": "copied of a read-only view by a fork of four workers that read it",
    "copied_writable": "the same of a writable one",
}


def broadcast_memory() -> str:
    figures = load("broadcast-memory")
    row = figures["rows"]["memory"]
    lines = [[text, cell(row, name)] for name, text in _BROADCAST_MEMORY.items()]
    return listed(figures, grid(["the most memory", "times the array"], lines, right=1))


_MANY_SMALL = {
    "frames": "a frame of 500,000 rows with a column of strings",
    "forests": "a forest of 50 trees, which is sent as it is",
    "arrays": "a million arrays of five numbers",
    "objects": "500,000 objects of a class with three attributes, columns made by a reducer",
    "kept": "a dictionary of 2,000,000 words and numbers, kept as columns",
    "words": "the same dictionary, columns made by a reducer",
    "numbers": "a dictionary of 2,000,000 numbers and numbers, by a reducer",
    "counters": "a `Counter` of 500,000 words, by a reducer",
}


def many_small() -> str:
    figures = load("many-small")
    lines = []
    for name, text in _MANY_SMALL.items():
        row = dict(figures["rows"][name])
        if name == "forests":
            row["after_s"] = None  # the same
        ratio = three(row["before_s"] / row["after_s"]) if row["after_s"] else ""
        times = [cell(row, f"{when}_s", seconds) for when in ("plain", "before", "after")]
        lines.append([text, *times, ratio])
    head = ["case", "plain", "before", "after", "before / after"]
    return listed(figures, grid(head, lines, right=4))


def forking() -> str:
    figures = load("forking")
    lines = [
        [
            name,
            cell(row, "first_s", seconds),
            cell(row, "first_each_gb_s", seconds),
            cell(row, "again_s", seconds),
        ]
        for name, row in figures["rows"].items()
    ]
    return listed(figures, grid(["held", "first fork", "for each GB", "fork again"], lines))


_STEPS = {
    "lease and release beside 10 live blocks": "a block leased and given back, by the module "
    "itself, beside 10 live ones",
    "lease and release beside 50,000 live blocks": "the same beside 50,000",
    "Arena.acquire and release": "a block through `Arena.acquire`",
    "send and recv of 256 KiB, above it": "an array of 256 KiB sent and received in one process, "
    "above its copy",
    "send and recv of 1024 KiB, above it": "the same of 1 MiB",
    "send and recv of 4096 KiB, above it": "of 4 MiB",
}


def steps() -> str:
    before, now = load("steps-before-the-core"), load("steps")

    def range_of(figures: Figures, name: str) -> str:
        row = figures["rows"].get(name)
        return f"{_us(row['least_s'])} to {_us(row['most_s'])}" if row else ""

    lines = [
        [text, *(range_of(one, name) for one in (before, now))] for name, text in _STEPS.items()
    ]
    table = grid(["what, us", "before the core", "with it"], lines)
    texts = [f"With the core: {source(now)}", f"Before it: {source(before)}"]
    return "\n\n".join([*map(paragraph, texts), table])


def pool_limit() -> str:
    figures = load("steps")
    rows, lines = figures["rows"], []
    for name in rows:
        if name.startswith("a task that copies ") and name.endswith(", above it"):
            task = name.removesuffix(", above it")
            copy_s, above_s = rows[f"{task}, the copy"]["least_s"], rows[name]["least_s"]
            limit = three(copy_s / (copy_s + above_s))
            lines.append([task, seconds(copy_s), seconds(above_s), limit])
    head = ["in a plain `Pool(1)`", "the copy", "above it", "of `np.copyto`"]
    return listed(figures, grid(head, lines, right=3))


def _us(duration_s: float) -> str:
    return three(duration_s * 1e6)


# --- scaling.py


def _scaling(head: list[str], steps: Iterable[int], columns: Iterable[tuple[str, str]]) -> str:
    """A line for each step; a column is a series and one of its figures."""
    figures = load("scaling")
    columns = list(columns)
    lines = [
        [
            f"{n:,}",
            *(
                cell(figures["rows"].get(f"{series} {n}", {}), name, seconds)
                for series, name in columns
            ),
        ]
        for n in steps
    ]
    return listed(figures, grid(head, lines))


def scaling_arrays() -> str:
    of_series = {"80MB": "80 MB together", "64KB": "64 KiB each", "1KB": "1 KB each"}
    return _scaling(
        ["arrays", *(f"{text}: {who}" for text in of_series.values() for who in ("ours", "plain"))],
        [10**k for k in range(6)],
        [(f"arrays-{name}", f"{who}_each_s") for name in of_series for who in _SIDES],
    )


_SIDES = ("ours", "reference")


def scaling_leased() -> str:
    names = ("acquire", "message", "statistics", "look", "fork")
    return _scaling(
        [
            *("blocks", "acquire and release", "200 KB message", "`statistics()`"),
            *("look for lost messages", "fork", "fork without hooks"),
        ],
        [1, 1_000, 100_000, 1_000_000],
        [*((f"leased-{name}", "ours_s") for name in names), ("leased-fork", "reference_s")],
    )


def scaling_processes() -> str:
    return _scaling(
        ["processes", "oobpickle", "plain"],
        [1, 2, 4, 8, 16, 32, 64],
        [("workers-messages", f"{who}_s") for who in _SIDES],
    )


def scaling_rates() -> str:
    channels = {"pipe": "`Pipe`", "queue": "`Queue`", "pool": "`Pool.imap`"}
    return _scaling(
        ["bytes", *(f"{text}: {who}" for text in channels.values() for who in ("ours", "plain"))],
        [1_000, 10_000, 100_000, 200_000, 1_000_000],
        [(f"rate-{name}", f"{who}_s") for name in channels for who in _SIDES],
    )


# --- peers.py


def _peer_rows(rows: Figures) -> Iterator[tuple[str, Figures, dict[str, Figures]]]:
    """Each row: its name, its verdict, and its peers."""
    for name, verdict in rows.items():
        if "place" in verdict:
            start = f"{name} "
            yield (
                name,
                verdict,
                {
                    key.removeprefix(start): row
                    for key, row in rows.items()
                    if key.startswith(start)
                },
            )


def _goal(verdict: Figures) -> str:
    if not verdict["is_judged"]:
        return "not judged"
    return "reached" if verdict["is_goal_reached"] else "**not reached**"


def peers() -> str:
    figures = load("peers")
    lines = []
    for name, verdict, of_peers in _peer_rows(figures["rows"]):
        ours = of_peers["oobpickle"]
        lines.append(
            [
                *(name, cell(ours, "median_s", seconds), cell(ours, "gigabytes_per_s")),
                cell(of_peers.get("Pool", {}), "median_s", seconds),
                *(verdict["best_by_value"], cell(verdict, "of_best_by_value")),
                *(verdict["best_of_others"], cell(verdict, "of_best_of_others")),
                f"{verdict['place']} of {verdict['n_by_value']}, {_goal(verdict)}",
            ]
        )
    head = [
        *("row", "oobpickle", "GB/s", "Pool", "best other by value", "oobpickle takes"),
        *("best that shares", "oobpickle takes", "place, goal"),
    ]
    return listed(figures, grid(head, lines))


def peers_all() -> str:
    widths = (11, 11, 5, 10, 8, 10)

    def line(name: str, cells: Iterable[str], held: str) -> str:
        columns = "".join(f"{one:>{width}}" for one, width in zip(cells, widths, strict=True))
        return f"  {name:22}{columns}  {held}"

    lines = [line("peer", ("median", "best", "n", "GB/s", "ratio", "peak MiB"), "receiver's array")]
    for name, verdict, of_peers in _peer_rows(load("peers")["rows"]):
        lines.append(name)
        for peer, row in of_peers.items():
            cells = (
                *(cell(row, "median_s", seconds), cell(row, "best_s", seconds)),
                *(str(row["n_messages"]), cell(row, "gigabytes_per_s"), cell(row, "ratio")),
                f"{row['peak_nbytes'] / _MIB:.0f}",
            )
            lines.append(line(peer, cells, row["held"]))
        lines += [f"  -> by value: place {verdict['place']} of {verdict['n_by_value']}", ""]
    return "\n".join(["```text", *lines[:-1], "```"])


# --- soak.py


def soak() -> str:
    runs = [load(name) for name in ("soak-2", "soak-1")]

    def line(text: str, *names: tuple[str, str], write: Callable[[Any], str] = str) -> list[str]:
        return [
            text,
            *(
                ", ".join(cell(run["rows"].get(row, {}), name, write) for row, name in names)
                for run in runs
            ),
        ]

    def count(number: float) -> str:
        return f"{number:,.0f}"

    lines = [
        line("messages verified", ("messages", "n"), write=count),
        line("GB in them", ("messages", "nbytes"), write=lambda n: f"{n / _GB:.1f}"),
        line("kills, and channels that worked again", ("kills", "n"), ("kills", "n_survived")),
        line("forks of the parent", ("forks", "n"), write=count),
        line("blocks that forks made private", ("forks", "n_private"), write=count),
        line("blocks that forks left shared", ("forks", "n_shared")),
        line("messages with the killed workers, or on their way", ("messages", "n_lost")),
        line("blocks of messages that nobody could read, reclaimed", ("reclaimed", "n")),
        line("fallbacks", ("fallbacks", "n")),
        line("wrong, lost otherwise, hung, or grown", ("problems", "n")),
        line("growth at rest: blocks in use", ("growth", "n_blocks")),
        line("bytes of the arena", ("growth", "arena_nbytes")),
        line("descriptors", ("growth", "n_descriptors")),
        line("MB of the parent", ("growth", "parent_nbytes"), write=lambda n: f"{n / 1e6:+.1f}"),
    ]
    head = ["what", *(f"`--seed {run['command'].rpartition(' ')[2]}`" for run in runs)]
    texts = (paragraph(source(run)) for run in runs)
    return "\n\n".join([*texts, grid(head, lines, right=2)])


# --- the list of all


def commands() -> str:
    lines = [
        [f"`{command_for(name)}`", f"`{name}.json`, {load(name)['date']}"]
        for name in SOURCES
        if name not in KEPT
    ]
    return grid(["command", "what it writes, and of which day that is"], lines)


def command_for(name: str) -> str:
    """Return the command that makes a file anew."""
    plots = f" --plots {PLOTS[name]}" if name in PLOTS else ""
    return f"{SOURCES[name]} --json docs/figures/{name}.json{plots}"


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "in-short": in_short,
    "transfer-results": transfer_results,
    "transfer": transfer,
    "kinds": kinds,
    "joblib": with_joblib,
    "sharing": sharing,
    "merging": merging,
    "broadcasting": broadcasting,
    "broadcast-memory": broadcast_memory,
    "spilling": spilling,
    "many-small": many_small,
    "forking": forking,
    "steps": steps,
    "pool-limit": pool_limit,
    "scaling-arrays": scaling_arrays,
    "scaling-leased": scaling_leased,
    "scaling-processes": scaling_processes,
    "scaling-rates": scaling_rates,
    "peers": peers,
    "peers-all": peers_all,
    "soak": soak,
    "commands": commands,
}


# --- the documents


def documents() -> list[Path]:
    """Return all documents that may have tables."""
    folders = ("docs", "benchmarks", "examples")
    found = [path for folder in folders for path in (PROJECT / folder).rglob("*.md")]
    return sorted([*PROJECT.glob("*.md"), *found])


def marked(text: str) -> dict[str, str]:
    """Return the tables of a document by their names, as they are."""
    return {found[1]: found[2] for found in _MARKED.finditer(text)}


def filled(text: str) -> str:
    """Return a document with all tables as they should be."""
    return _MARKED.sub(lambda found: _section(found[1]), text)


def _section(name: str) -> str:
    if name not in TABLES:
        raise ValueError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
    return f"<!-- figures: {name} -->\n{TABLES[name]()}\n\n<!-- end -->"


def main() -> int:
    """Write the documents that are not as they should be, or name them."""
    is_check = sys.argv[1:] == ["--check"]
    wrong = []
    for path in documents():
        text = path.read_text()
        if filled(text) != text:
            wrong.append(path)
            if not is_check:
                path.write_text(filled(text))
    for path in wrong:
        print(path.relative_to(PROJECT), "is stale" if is_check else "has new tables")
    return int(is_check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
