"""What an adapter must not lose: rows or prompts of other skills, and the base model's own answers to them.

:func:`load_keep` reads them (``prompts.jsonl`` here is what ``auto`` stands for), :func:`split_keep` parts them,
:func:`answer_by` lets the loaded model answer prompts, and :func:`degenerate` looks at answers with other eyes than
a likelihood: are they empty, do they run in a loop?
"""

from spectral_surgery.keeping.answering import Answered, answer_by, degenerate
from spectral_surgery.keeping.rows import AUTO, RANDOM, Keep, KeepRow, load_keep, random_token_rows, split_keep

__all__ = [
    "AUTO",
    "RANDOM",
    "Answered",
    "Keep",
    "KeepRow",
    "answer_by",
    "degenerate",
    "load_keep",
    "random_token_rows",
    "split_keep",
]
