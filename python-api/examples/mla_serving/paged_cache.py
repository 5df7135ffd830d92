"""The paged latent KV cache: one tensor per layer, one set of pages for all requests.

A page is `page_size` consecutive tokens of one request. Page p means the same tokens in the cache
of every layer, so one block table, one list of slots and one allocator serve the whole model.
"""

from __future__ import annotations

import torch

import flash_mla


class PagedLatentCache:
    """Latent caches of all layers, and the free list of their pages.

    Args:
        num_layers: Layers of the model; each has its own tensor.
        num_pages: Pages that the requests share.
        page_size: Tokens per page.
        d_qk: Columns of a token: kv_lora_rank latent columns, then qk_rope_head_dim RoPE columns.
        device: Where the caches live.

    Attributes:
        layers: `num_layers` bfloat16 tensors [num_pages, page_size, 1, d_qk].
    """

    def __init__(
        self, num_layers: int, num_pages: int, page_size: int, d_qk: int, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.device = device
        self.layers = [
            flash_mla.kv_cache_empty("bf16", num_pages, page_size, d_qk=d_qk, device=device)
            for _ in range(num_layers)
        ]
        # A stack: the page freed last is handed out first, while it is still warm in L2.
        self._free_pages = list(reversed(range(num_pages)))
        self._times_allocated = [0] * num_pages

    def pages_needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def can_allocate(self, num_pages: int) -> bool:
        return num_pages <= len(self._free_pages)

    def allocate(self, num_pages: int) -> list[int]:
        """Takes pages off the free list. They still hold whatever their last owner wrote."""
        if not self.can_allocate(num_pages):
            raise RuntimeError(f"{num_pages} pages wanted, {len(self._free_pages)} free")
        pages = [self._free_pages.pop() for _ in range(num_pages)]
        for page in pages:
            self._times_allocated[page] += 1
        return pages

    def free(self, pages: list[int]) -> None:
        self._free_pages.extend(reversed(pages))

    @property
    def pages_free(self) -> int:
        return len(self._free_pages)

    @property
    def pages_used(self) -> int:
        """Distinct pages that any request has owned so far."""
        return sum(times > 0 for times in self._times_allocated)

    @property
    def pages_reused(self) -> int:
        """How often a page was handed to another request after its first owner."""
        return sum(max(times - 1, 0) for times in self._times_allocated)

    def slots(self, pages: list[int], start: int, stop: int) -> list[int]:
        """Where tokens start .. stop - 1 of the request that owns `pages` are stored.

        A slot is page * page_size + offset: what `flash_mla.kv_cache_append` writes to.
        """
        size = self.page_size
        return [pages[token // size] * size + token % size for token in range(start, stop)]

    def block_table(self, pages_of_requests: list[list[int]]) -> torch.Tensor:
        """The pages of each request in token order, int32 [b, max_pages].

        Shorter rows are padded. The kernel never reads an entry past the request's length, so the
        padding may be anything; -1 is no page at all.
        """
        width = max(len(pages) for pages in pages_of_requests)
        rows = [pages + [-1] * (width - len(pages)) for pages in pages_of_requests]
        return torch.tensor(rows, dtype=torch.int32, device=self.device)
