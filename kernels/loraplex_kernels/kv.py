"""KV pages: their layout inside a page and the write of new keys and values.

A page holds ``page_size`` tokens of all layers as (L, 2, G, S, H): layers, key/value, KV heads, slots, head dim; so
that what one head of one layer reads is one dense (S, H) tile. Page ids come from the caller, never from here.
Legend: P pages, L layers, G KV heads, S slots of a page, H head dim, T tokens.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int

    @property
    def elements_per_page(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.page_size

    @property
    def tiles_per_layer(self) -> int:
        """(S, H) tiles of one layer in a page: keys of every head, then values of every head."""
        return 2 * self.num_kv_heads

    @property
    def tiles_per_page(self) -> int:
        return self.num_layers * self.tiles_per_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPages:
    """Two typed views of one arena whose pages are ``layout``'s. Made by ``view_kv_pages``."""

    layout: KvLayout
    tiles: torch.Tensor
    """(P * L * 2 * G, S * H): one head's keys or values of a page."""
    rows: torch.Tensor
    """(P * L * 2 * G * S, H): one head's key or value of one token."""


def view_kv_pages(elements: torch.Tensor, layout: KvLayout) -> KvPages:
    """``elements``: (P * elements_per_page,), dense, the arena in the KV's dtype. No copy."""
    return KvPages(
        layout=layout,
        tiles=elements.view(-1, layout.page_size * layout.head_dim),
        rows=elements.view(-1, layout.head_dim),
    )


def kv_row_index(layout: KvLayout, pages_T: torch.Tensor, slots_T: torch.Tensor) -> torch.Tensor:
    """Where layer 0 of each token lies in ``KvPages.rows``: (T, 2G) int64, keys of all heads before values.

    ``pages_T``: (T,) page ids; ``slots_T``: (T,) position modulo ``page_size``. Layer l lies ``l * 2G * S`` rows on.
    """
    tiles_C = torch.arange(layout.tiles_per_layer, dtype=torch.int64, device=pages_T.device)
    tiles_TC = pages_T[:, None] * layout.tiles_per_page + tiles_C
    return tiles_TC * layout.page_size + slots_T[:, None]


def write_kv_(kv: KvPages, layer: int, row_index_TC: torch.Tensor, kv_TCH: torch.Tensor) -> None:
    """Stores the keys and values of one layer. ``row_index_TC`` from ``kv_row_index``; ``kv_TCH``: (T, 2G, H)."""
    shift = layer * kv.layout.tiles_per_layer * kv.layout.page_size
    kv.rows.index_put_((row_index_TC + shift,), kv_TCH)
