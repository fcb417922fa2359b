"""Markdown tables, and what their cells say."""


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def by_columns(rows, columns):
    """A table with a line per row and a column per header: a key of the rows, or a function of a row."""
    cells = [cell if callable(cell) else lambda row, key=cell: row[key] for cell in columns.values()]
    return table(list(columns), ([cell(row) for cell in cells] for row in rows))


def against(op, size, form, peer):
    """The columns of an op beside a peer, for `by_columns`."""
    return {f"`{op}`": by_direction, size: size, "ms": shown("ours_ms", form), f"over {peer}": times("ratio")}


def pivot(rows, corner, label, column, value, columns):
    """A table with a line per label(row) and a column per row[column] in `columns`; empty without rows."""
    if not rows:
        return ""
    cells = {}
    for row in rows:
        cells.setdefault(label(row), {})[row[column]] = value(row)
    return table([corner, *(f"{c:g}" for c in columns)], ([name, *(found.get(c, "") for c in columns)]
                                                          for name, found in cells.items()))  # fmt: skip


def times(key):
    return lambda row: f"{row[key]:.2f}x"


def shown(key, form):
    return lambda row: form.format(row[key])


def where_there(key, form):
    return lambda row: optional(row, key, form)


def by_tokens(row):
    return f"{row['dtype']}, {row['tokens']} token{'s' if row['tokens'] > 1 else ''}"


def by_shape(row):
    return f"{row['shape'].replace('x', ' to ')}, {row['dtype']}"


def direction(row):
    return "forward" if row["what"] == "forward" else "forward + backward"


def by_direction(row):
    return f"{direction(row)}, {row['dtype']}"


def optional(row, key, form):
    return form.format(row[key]) if row.get(key) is not None else ""


def milliseconds(value):
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms" if value >= 1 else f"{1e3 * value:.0f} us"


def spread(rows, key):
    low, high = min(r[key] for r in rows), max(r[key] for r in rows)
    return f"{milliseconds(low)} to {milliseconds(high)}"
