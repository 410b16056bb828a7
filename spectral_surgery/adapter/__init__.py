"""The adapter folder: read, check, save. See :mod:`.adapter`."""

from spectral_surgery.adapter.adapter import Adapter
from spectral_surgery.adapter.config import AdapterConfig

__all__ = ["Adapter", "AdapterConfig"]
