"""``python -m spectral_surgery`` is the same as the command ``spectral-surgery``."""

from __future__ import annotations

from spectral_surgery.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
