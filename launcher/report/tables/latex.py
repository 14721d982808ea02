"""Tables as LaTeX: a `table` with booktabs rules, ready for \\input in a paper."""

from __future__ import annotations

from collections.abc import Sequence

from moe_testbed.launcher.report.tables.table import Cell

_ESCAPED = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "%": r"\%",
        "&": r"\&",
        "#": r"\#",
        "$": r"\$",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "−": "$-$",
        "±": r"$\pm$",
        "×": r"$\times$",
        "–": "--",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
        "\n": " ",
        "\r": " ",
    }
)


def escape(text: str) -> str:
    """The text, so that LaTeX prints it as it stands."""
    return text.translate(_ESCAPED)


def latex_table(caption: str, label: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The first column is flush left, the others right; a cell's note stands behind its text.

    Braces around the first cell keep LaTeX from taking a bracket there for the argument of the row before it.
    """
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}[t]",
        r"  \centering\small",
        rf"  \caption{{{escape(caption)}}}",
        rf"  \label{{{label}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
        r"    \toprule",
        f"    {_row(columns)}",
        r"    \midrule",
        *(f"    {_row([f'{cell.text} {cell.note}'.strip() for cell in row])}" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _row(texts: Sequence[str]) -> str:
    first, *others = map(escape, texts)
    return " & ".join([f"{{{first}}}", *others]) + r" \\"
