"""Results as Markdown tables."""

from typing import Any

from bench.ops.weight_lists import is_size

# the parts of a step in their order; whatever else an arm names comes after them
PARTS = ("data", "attack", "ascent", "descent", "update", "log", "other")
# key of a row: heading, format; a column that no row of an operation fills is left out
_COLUMNS = {
    "median_ms": ("median ms", "{:.3f}"),
    "min_ms": ("least ms", "{:.3f}"),
    "ratio": ("time ratio", "{:.2f}"),
    "device_ms": ("on the device ms", "{:.3f}"),
    "device_ratio": ("ratio there", "{:.2f}"),
    "gb_per_s": ("GB/s", "{:.1f}"),
    "share_of_copy": ("of a copy", "{:.0%}"),
    "page_faults": ("page faults", "{:.0f}"),
}

Result = dict[str, Any]


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def machine_line(result: Result) -> str:
    """On what, when and under which load a result was measured."""
    machine, load = result["machine"], result["load_average"]
    cuda = f", CUDA {machine['cuda']}" if machine["device"] == "cuda" else ""
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'} of {machine['cores']} cores"
    return (
        f"{machine['device_name']}, torch {machine['torch']}{cuda}, {threads}, {result['date'][:10]}, "
        f"load {load['least']:.1f} to {load['most']:.1f}"
    )


def step_title(result: Result) -> str:
    """What was measured."""
    settings = result["settings"]
    told = ", ".join(f"{name} {value}" for name, value in settings["engine"].items())
    engine = f", engine with {told}" if told else ""
    method = settings["method"].upper()
    return f"{method} step of {settings['model']}, batch {settings['batch_size']}, PGD-{settings['steps']}{engine}"


def parts_of(result: Result) -> list[str]:
    """The parts that any arm has, in order."""
    found = {part for arm in result["arms"] for part in arm["components"]}
    return [part for part in PARTS if part in found] + sorted(found - set(PARTS))


def ratio_text(ratio: dict[str, float]) -> str:
    """The median of the rounds' ratios and the quartiles."""
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f}"


def fastest_format(result: Result) -> str:
    """The number format with the highest ceiling."""
    matmul: dict[str, float] = result["ceilings"]["matmul_tflops"]
    return max(matmul, key=lambda form: matmul[form])


def step_tables(result: Result) -> str:
    """The arms, and their parts."""
    work, ceilings, form = result["work"], result["ceilings"], fastest_format(result)
    headings = ["arm", "median ms (quartiles)", "least ms", "times the engine's", "TFLOP/s", f"of {form} product"]
    headings += ["peak GiB", "with warm-up", "first step s"]
    rows = []
    for arm in result["arms"]:
        seconds, ratio = arm["seconds"], result["ratios"].get(arm["name"])
        low, middle, high = (f"{seconds[key] * 1e3:.1f}" for key in ("q1", "median", "q3"))
        rows.append(
            [
                arm["name"] + ("" if arm["finite"] else " (weights not finite)"),
                f"{middle} ({low} to {high})",
                f"{seconds['min'] * 1e3:.1f}",
                "1" if ratio is None else ratio_text(ratio),
                f"{arm['tflops']:.3g}",
                f"{arm['share_of_matmul'][form]:.1%}",
                _gib(arm["memory"]["peak_bytes_timed"]),
                _gib(arm["memory"]["peak_bytes"]),
                f"{arm['first_step_seconds']:.1f}",
            ]
        )
    parts = parts_of(result)
    shares = [
        [
            arm["name"],
            *(f"{arm['components'][part]['median'] * 1e3:.2f}" if part in arm["components"] else "-" for part in parts),
            "-" if arm["update_share_of_copy"] is None else f"{arm['update_share_of_copy']:.0%}",
        ]
        for arm in result["arms"]
    ]
    matmul = ", ".join(f"{name} {value:.3g}" for name, value in ceilings["matmul_tflops"].items())
    first = result["arms"][0]["seconds"]
    return "\n\n".join(
        [
            f"{step_title(result)}: {machine_line(result)}",
            markdown(headings, rows),
            markdown(["median ms", *parts, "update of a copy"], shares),
            f"n = {first['n']} steps an arm in {result['settings']['repeats']} rounds; a ratio is the median "
            f"(quartiles) over the rounds. The method needs {work['forward_units']} forward passes' worth of work, "
            f"{work['step_tflop']:.3g} TFLOP a step, at the matrix product's rate {work['floor_seconds'] * 1e3:.3g} "
            f"ms; TFLOP/s counts that and no more, whatever an arm does. Ceilings: {matmul} TFLOP/s, copy "
            f"{ceilings['copy_gb_per_s']:.3g} GB/s. Memory: {memory_text(result)}.{tf32_text(result)}"
            f"{convolutions_text(result)}",
        ]
    )


def tf32_text(result: Result) -> str:
    """Which arms' fp32 convolutions and products round their operands to TF32; nothing where there is no such thing."""
    if result["machine"]["device"] != "cuda":
        return ""
    told = {arm["name"]: arm["torch_settings"] for arm in result["arms"]}
    convolutions = [name for name, found in told.items() if found["cudnn.allow_tf32"]]
    products = [name for name, found in told.items() if found["float32_matmul_precision"] != "highest"]
    return (
        f" TF32 in fp32 convolutions: {', '.join(convolutions) or 'no arm'}; in fp32 products: "
        f"{', '.join(products) or 'no arm'}."
    )


def convolutions_text(result: Result) -> str:
    """What part of the engine's step its convolutions take, timed alone; nothing where that was not measured."""
    # results of before it was
    found = result.get("convolution_seconds")
    if found is None:
        return ""
    total, step = sum(found.values()), result["arms"][0]["seconds"]["median"]
    return (
        f" Alone, the engine's convolutions take {total:.3g} s, {total / step:.0%} of the step (forward "
        f"{found['forward']:.3g} s, backward {found['backward']:.3g} s)."
    )


def memory_text(result: Result) -> str:
    """What the peaks are."""
    if result["machine"]["device"] == "cuda":
        most = "the most that torch's allocator handed out in the arm's own process"
        return f"{most}; that of a step in a graph is handed out while it is captured, in the warm-up"
    return "peak resident set of the arm's own process, less what it held before data and model were made"


def suite_tables(result: Result) -> str:
    """A table for each operation over the sizes, and one for each operation on other inputs."""
    tables = [machine_line(result)]
    for operation in dict.fromkeys(row["operation"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["operation"] == operation]
        sized = [row for row in rows if is_size(row["inputs"])]
        if sized:
            tables += [f"{operation}, by number of elements: median ms (share of a copy)", _sizes_table(sized)]
        for inputs in dict.fromkeys(row["inputs"] for row in rows if not is_size(row["inputs"])):
            tables += [f"{operation}, {inputs}", _table([row for row in rows if row["inputs"] == inputs])]
    return "\n\n".join(tables)


def _table(rows: list[Result]) -> str:
    columns = {key: column for key, column in _COLUMNS.items() if any(key in row for row in rows)}
    cells = [
        [row["implementation"], *(form.format(row[key]) if key in row else "-" for key, (_, form) in columns.items())]
        for row in rows
    ]
    return markdown(["implementation", *(heading for heading, _ in columns.values())], cells)


def _sizes_table(rows: list[Result]) -> str:
    sizes = sorted({row["inputs"] for row in rows}, key=float)
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        text = f"{row['median_ms']:.3g} ({row['share_of_copy']:.0%})"
        cells.setdefault(row["implementation"], {})[row["inputs"]] = text
    return markdown(["implementation", *sizes], [[n, *(c.get(s, "-") for s in sizes)] for n, c in cells.items()])
