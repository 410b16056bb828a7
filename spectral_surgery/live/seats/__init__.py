"""Where gates sit in PEFT's layers: one small file a seat, each with the same three functions.

``check(layer, path)`` refuses a layer that the seat does not know; ``components(site, update, spectrum)`` fits a
module's components to it; ``attach(sites, gating, stack)`` puts the gates of all sites of one layer in, and leaves on
the stack what takes them out again. Nothing of it enters a state dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from spectral_surgery.live.gating import Gating
from spectral_surgery.live.seats import attention, dora, embedding, experts, layer, lora_b
from spectral_surgery.live.seats.site import Site

SEATS = {
    "lora_B": lora_b,
    "layer": layer,
    "embedding": embedding,
    "dora": dora,
    "experts": experts,
    "attention": attention,
}

__all__ = ["SEATS", "Site", "attached"]


@contextmanager
def attached(sites: Iterable[Site], gating: Gating) -> Iterator[None]:
    """Applies gates at these sites while open; nothing is left behind, also after an exception."""
    together: dict[int, list[Site]] = {}
    for site in sites:
        together.setdefault(id(site.layer), []).append(site)
    with ExitStack() as stack:
        for group in together.values():
            SEATS[group[0].place.seat].attach(group, gating, stack)
        yield
