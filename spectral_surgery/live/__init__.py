"""A loaded model whose components can be gated and measured. See :mod:`.live`."""

from spectral_surgery.live.gating import NotPerExampleError, Probe
from spectral_surgery.live.live import Live
from spectral_surgery.live.loading import check_fits, load, load_tokenizer

__all__ = ["Live", "NotPerExampleError", "Probe", "check_fits", "load", "load_tokenizer"]
