"""The tables of a report: for the page, a terminal, LaTeX and CSV."""
