"""What experiments found: runs, tables of them and figures, from any run file and from the published results.

:mod:`.runs` holds one run and its file, :mod:`.published` the paper's own runs, :mod:`.comparisons` what tables and
figures say in numbers, :mod:`.writing` tables as text, Markdown, LaTeX and CSV, :mod:`.drawing` the figures, and
:mod:`.summary` puts all of it together.
"""
