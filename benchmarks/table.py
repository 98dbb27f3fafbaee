"""Write the figures in README.md and docs/speed.md anew from the rows in benchmarks/results.

python benchmarks/table.py            rewrites what stands between the markers
python benchmarks/table.py --check    exit code 1 where that would change anything
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onchip.bench import rows
from onchip.bench.rows import Row

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "speed.md")
RESULTS = ROOT / "benchmarks" / "results"
CEILINGS = {"mm": "torch.mm", "read": "read rate", "copy": "copy rate"}


def operation_of(row: Row) -> str | None:
    """What the row measures; None for attention."""
    return getattr(row.case, "operation", None)


@dataclass(frozen=True)
class Line:
    """One line of the table: the cases it sums up, by suite and attributes, and the peer they are held against."""

    work: str
    suite: str
    where: Mapping[str, object]
    peer: str = "sdpa_flash"
    against: str = "SDPA flash"
    operation: str | None = None  # other than attention
    headline: bool = True  # in README, too

    def sums_up(self, row: Row) -> bool:
        """Whether the row is one of the line's."""
        about = operation_of(row) == self.operation and row.case.suite == self.suite and self.peer in row.ratio
        return about and all(getattr(row.case, name) == value for name, value in self.where.items())


FORWARD, BOTH, FULL, CAUSAL = {"grad": False}, {"grad": True}, {"causal": False}, {"causal": True}
MASKED = "SDPA, dense mask"
MODEL = "SmolLM2-135M's shape in transformers"
MAMBA, ALONE = "Mamba of transformers, 4 layers of 256", "without onchip"
LINES = [
    Line("float32 forward, full", "forward", FULL),
    Line("float32 forward, causal", "forward", CAUSAL),
    Line("float32 forward + backward, full", "backward", FULL, headline=False),
    Line("float32 forward + backward, causal", "backward", CAUSAL),
    Line("bfloat16 forward + backward, full", "bf16", FULL, headline=False),
    Line("bfloat16 forward + backward, causal", "bf16", CAUSAL),
    Line("window 256, T 4096, forward", "window", FORWARD, "flex", "flex"),
    Line("window 256, T 4096, forward", "window", FORWARD, against=MASKED, headline=False),
    Line("window 256, T 4096, forward + backward", "window", BOTH, against=MASKED, headline=False),
    Line("decode, Tk 32768, 32/8 heads, float32", "decode", {"dtype": "float32"}),
    Line("decode, Tk 32768, 32/8 heads, bfloat16", "decode", {"dtype": "bfloat16"}, headline=False),
    Line("a tiny call, 1 thread", "overhead", {}, "sdpa", "SDPA"),
    *(
        Line(work, suite, BOTH if suite == "dropout" else {}, "without", against, "attention_features", headline=False)
        for work, suite, against in (
            ("dropout 0.1, T 2048, forward + backward", "dropout", "no dropout"),
            ("decode, Tk 8192, pages of 16", "paged", "a cache in one piece"),
        )
    ),
    *(
        Line(f"{MODEL}, {words}, {dtype}", suite, {"dtype": dtype}, "sdpa", "SDPA", headline=dtype == "float32")
        for suite, words in (("prefill", "a prompt"), ("step", "a decoding step"))
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Line(work, suite, {"dtype": dtype}, peer, against or peer, operation, headline=dtype == "float32")
        for work, operation, suite, dtype, peer, against in (
            ("causal_conv1d forward, W 4", "causal_conv1d", "forward", "float32", "conv1d", "torch conv1d"),
            ("selective_scan forward", "selective_scan", "forward", "float32", "transformers", ""),
            ("selective_scan forward + backward", "selective_scan", "backward", "float32", "mambapy", ""),
            ("ssd forward", "ssd", "forward", "float32", "transformers", ""),
            ("ssd forward + backward", "ssd", "backward", "float32", "transformers", ""),
            (f"{MAMBA}, forward", "mamba", "forward", "float32", "transformers", ALONE),
            (f"{MAMBA}, a training step, T 1024", "mamba", "once", "float32", "transformers", ALONE),
            ("Mamba-2 130M's shape, a decoding step, float32", "mamba", "step", "float32", "transformers", ""),
            ("Mamba-2 130M's shape, a decoding step, bfloat16", "mamba", "step", "bfloat16", "transformers", ""),
        )
    ),
    *(
        Line(work, suite, {"dtype": "float32"}, peer, against, operation, headline=False)
        for work, operation, suite, peer, against in (
            ("selective_scan forward", "selective_scan", "forward", "mambapy", "mambapy"),
            ("ssd forward", "ssd", "forward", "eager", "eager, by heads"),
            ("ssd forward + backward", "ssd", "backward", "eager", "eager, by heads"),
            (f"{MAMBA}, a training step, T 256 and 512", "mamba", "train", "transformers", ALONE),
            (f"{MAMBA}, a training step, T 256 and 512", "mamba", "train", "mambapy", "mambapy"),
            (f"{MAMBA}, a training step, T 1024", "mamba", "once", "mambapy", "mambapy"),
        )
    ),
]


@dataclass(frozen=True)
class Published:
    """A case that others published in float16 on an H100, in TFLOP/s, and the row that measures it here."""

    work: str
    where: Mapping[str, object]
    figures: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)

    def is_of(self, row: Row) -> bool:
        """Whether the row, one of attention, measures this."""
        where = {"dtype": "bfloat16", "window": None, **self.where}
        return all(getattr(row.case, name) == value for name, value in where.items())

    def line(self, measured: Sequence[Row]) -> str:
        """In Markdown, with what was measured here, or that nothing was."""
        row = next((row for row in measured if operation_of(row) is None and self.is_of(row)), None)
        cells = [self.work, *("–" if figure is None else f"{figure}" for figure in self.figures)]
        if row is None:
            cells += ["not run"] + [""] * len(PEERS) + [""] if measured else ["not run"]
        else:
            cells += [_rate(row, name) for name in ("onchip", *PEERS)]
            cells.append(f"{row.fraction['onchip']:.0%} of {CEILINGS[row.of]}")
        return f"| {' | '.join(cells)} |"


SOURCES = ("FA-2", "Triton tutorial", "cuDNN 9.1", "FA-3")
PEERS = {"sdpa_flash": "SDPA flash", "sdpa_cudnn": "SDPA cuDNN"}
LONG = {"q_len": 16384, "k_len": 16384}
PUBLISHED = [
    Published("forward, D 128, full", {"suite": "forward", "head_dim": 128, **LONG, **FULL}, (370, 395, 595, 648)),
    Published("forward, D 128, causal", {"suite": "forward", "head_dim": 128, **LONG, **CAUSAL}, (335, 378, 539, 616)),
    Published("forward, D 64, full", {"suite": "forward", "head_dim": 64, **LONG, **FULL}, (324, 403, 413, 497)),
    Published("backward, D 128, full", {"suite": "backward", "head_dim": 128, **LONG, **FULL}, (322, None, 516, 561)),
    Published("decode, D 128, 32/8 heads, Tk 65536", {"suite": "decode", "head_dim": 128, "k_len": 65536}),
]


def gpu_table(measured: Sequence[Row]) -> str:
    """The table of one GPU, in Markdown; of no rows, what there is to compare with."""
    newest = max(measured, key=lambda row: row.date, default=None)
    if newest is not None:  # rows of other runs would stand under its commit and versions
        measured = [row for row in measured if row.machine == newest.machine]
    headings = ["GPU, T 16384", *(f"H100: {source}" for source in SOURCES), "onchip"]
    if measured:
        headings += [*PEERS.values(), "of the ceiling"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *(line.line(measured) for line in PUBLISHED)]
    others = [row for row in measured if operation_of(row) is not None]
    if others:
        lines += ["", *operation_lines(others)]
    about = "No GPU was at hand: nothing was measured on one."
    if newest is not None:
        machine = newest.machine
        about = (
            f"Measured in bfloat16 on an {machine.name}, {newest.date}: torch {machine.torch}, Triton {machine.triton},"
            f" CUDA {machine.cuda}, driver {machine.driver}, commit {machine.commit}."
        )
    return "\n".join(
        [
            *lines,
            f"\n{about} TFLOP/s, what is held against memory in GB/s; the H100's figures are as published, in float16.",
        ]
    )


def operation_lines(measured: Sequence[Row]) -> list[str]:
    """Of one GPU's rows of the other operations, in Markdown: rate, ceiling and the speed over each peer."""
    peers = list(dict.fromkeys(name for row in measured for name in row.ratio))
    headings = ["GPU", "onchip", "of the ceiling", *(f"over {peer}" for peer in peers)]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in measured:
        work = ", ".join((f"{row.case.operation} {row.case.suite}", *row.case.labels[:-1]))
        share = f"{row.fraction['onchip']:.0%} of {CEILINGS[row.of]}" if row.of else "–"
        ratios = (_range([row.ratio[peer].median] if peer in row.ratio else []) for peer in peers)
        lines.append(f"| {work} | {_rate(row, 'onchip')} | {share} | {' | '.join(ratios)} |")
    return lines


def table(measured: Sequence[Row], headlines: bool = False) -> str:
    """The table of one machine with a CPU, in Markdown; of the headlines alone where asked for."""
    machine = max((row.machine for row in measured), key=lambda machine: machine.threads)
    mallocs = sorted({row.machine.malloc for row in measured})
    headings = ["work", "against", *(f"speed, malloc {malloc}" for malloc in mallocs), "of the ceiling"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for line in LINES:
        if headlines and not line.headline:
            continue
        here = [row for row in measured if line.sums_up(row)]
        if here:
            by_malloc = ([row for row in here if row.machine.malloc == malloc] for malloc in mallocs)
            speeds = [_range(row.ratio[line.peer].median for row in some) for some in by_malloc]
            share = "–"
            if here[0].of:
                share = f"{_percent(row.fraction['onchip'] for row in here)} of {CEILINGS[here[0].of]}"
            lines.append(f"| {line.work} | {line.against} | {' | '.join(speeds)} | {share} |")
    extra = [row.extra["onchip"] for row in measured if row.extra]
    if extra:
        lines.append(f"\nMemory beyond inputs and outputs at T 8192: {max(extra):+.1%} at most.")
    glue = [
        1e3 * (row.ms["onchip"].median - row.ms["attention"].median) for row in measured if row.case.suite == "glue"
    ]
    if glue and not headlines:
        lines.append(f"\nA layer of transformers takes {max(glue):.0f} µs beyond onchip.attention's call.")
    lines.append(
        f"\n{machine.name}, {machine.threads} threads, {machine.capability}, torch {machine.torch}. Ranges are over"
        " sequence lengths and head dims. `onchip bench` measures yours."
    )
    return "\n".join(lines)


def figure(measured: Sequence[Row]) -> str:
    """The one figure at the top."""
    trained = [
        row for row in measured
        if operation_of(row) is None and row.case.suite == "backward"
        and row.case.causal and row.machine.malloc == "default"
    ]  # fmt: skip
    if not trained:
        return "Not measured yet."
    row = max(trained, key=lambda row: (row.case.q_len, -row.case.head_dim))
    ratio, machine = row.ratio["sdpa_flash"], row.machine
    return (
        f"**Causal attention over {row.case.q_len:,} tokens, forward and backward, on {machine.threads} cores of an"
        f" {machine.name}: {ratio.median:.2f} times as fast as PyTorch's flash kernel.**"
    )


def updated(page: str, results: Path = RESULTS) -> str:
    """`page` with what stands between its markers made anew."""
    folders = sorted({path.parent for path in results.glob("*/*.jsonl")})
    machines = [[row for path in sorted(folder.glob("*.jsonl")) for row in rows.read(path)] for folder in folders]
    cpus = [machine for machine in machines if machine and not machine[0].machine.gpu]
    gpus = [machine for machine in machines if machine and machine[0].machine.gpu]
    parts = {
        "figure": figure([row for machine in cpus for row in machine]),
        "headlines": "\n\n".join(table(machine, headlines=True) for machine in cpus),
        "cpu": "\n\n".join(map(table, cpus)),
        "gpu": "\n\n".join(map(gpu_table, gpus or [[]])),
    }
    for name, text in parts.items():
        begin, end = f"<!-- {name}: made by benchmarks/table.py -->\n", f"<!-- end of {name} -->"
        if begin in page:
            before, rest = page.split(begin)
            page = before + begin + text + "\n" + end + rest.split(end)[1]
    return page


def _rate(row: Row, name: str) -> str:
    return f"{row.rate[name]:.0f}" if name in row.rate else "–"


def _range(values: Iterable[float]) -> str:
    """
    >>> _range([1.234, 1.567]), _range([12.3, 12.34]), _range([])
    ('1.23–1.57×', '12×', '')
    """
    found = [f"{value:.3g}" if value < 10 else f"{value:.0f}" for value in sorted(values)]
    return "–".join(dict.fromkeys([found[0], found[-1]])) + "×" if found else ""


def _percent(values: Iterable[float]) -> str:
    found = [f"{value:.0%}" for value in sorted(values)]
    return "–".join(dict.fromkeys([found[0].rstrip("%"), found[-1].rstrip("%")])) + " %"


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text()
        if "--check" not in sys.argv[1:]:
            page.write_text(updated(text))
        elif updated(text) != text:
            sys.exit(f"{page.name} is older than the rows: python benchmarks/table.py")
