"""What a verdict looks like: text for the terminal, one self-contained page, figures, a model card.

The verdict as refine writes it to verdict.json is the only input. Page and figures need the ``report`` extra; text and
card do not.
"""

from spectral_surgery.report.card import render as card
from spectral_surgery.report.publishing import publishable
from spectral_surgery.report.summary import render as summary
from spectral_surgery.report.writing import unavailable, write_report

__all__ = ["card", "publishable", "summary", "unavailable", "write_report"]
