"""Continuous batching: requests join when there is room, decode together, leave when done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import flash_mla

from .model import DecodeBatch, PrefillBatch, ServingModel
from .paged_cache import PagedLatentCache


@dataclass
class Request:
    """One prompt and what has been generated for it.

    Attributes:
        name: For tables and progress lines.
        prompt: Token ids, at least one.
        max_new_tokens: Generation stops here.
        arrival_step: The engine step at which the request enters the queue.
        forced_tokens: Continue with these instead of the model's own choice (teacher forcing).
        tokens: Prompt and generated tokens. The last one is not in the cache yet.
        logits: One float32 [vocab_size] on the CPU per generated token.
        pages: Pages that the request owns, in token order.
    """

    name: str
    prompt: list[int]
    max_new_tokens: int
    arrival_step: int = 0
    forced_tokens: list[int] | None = None
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return len(self.logits)

    @property
    def done(self) -> bool:
        return self.num_generated >= self.max_new_tokens

    def add_token(self, logits: Tensor) -> None:
        """Takes the next token from the logits (greedy), or from `forced_tokens`."""
        if self.forced_tokens is None:
            token = int(logits.argmax())
        else:
            token = self.forced_tokens[self.num_generated]
        self.logits.append(logits)
        self.tokens.append(token)


@dataclass
class Throughput:
    """Tokens and seconds of the two passes."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0


class Engine:
    """Serves requests: each step admits and prefills what fits, then decodes one token for all.

    A request gets the pages for its whole life when it is admitted, so that decoding never runs
    out of them. An engine that admits more would allocate on demand and preempt when it must.

    Args:
        model: The forward pass.
        cache: The pages; `model` holds the tensors of the same cache.
        max_batch: Most requests that decode together.
        log: Receives one line whenever requests join or leave.
    """

    def __init__(
        self,
        model: ServingModel,
        cache: PagedLatentCache,
        max_batch: int,
        log: Callable[[str], None] = print,
    ) -> None:
        self.model = model
        self.cache = cache
        self.max_batch = max_batch
        self.log = log
        self.step = 0
        self.throughput = Throughput()
        self._running: list[Request] = []

    def run(self, requests: list[Request]) -> None:
        """Serves all requests to their end, in order of arrival."""
        waiting = sorted(requests, key=lambda request: request.arrival_step)
        while waiting or self._running:
            admitted = self._admit(waiting)
            if admitted:
                self._prefill(admitted)
                self._running += admitted
                self._retire()
            if self._running:
                self._decode(self._running)
                self._retire()
            elif waiting and not admitted and waiting[0].arrival_step <= self.step:
                raise RuntimeError(f"{waiting[0].name} needs more pages than the cache has")
            self.step += 1

    def _admit(self, waiting: list[Request]) -> list[Request]:
        """Takes requests off the queue while there is room for them, and gives them pages."""
        admitted: list[Request] = []
        while waiting and len(self._running) + len(admitted) < self.max_batch:
            request = waiting[0]
            # The last generated token is never fed back, so it needs no slot.
            num_tokens = len(request.prompt) + request.max_new_tokens - 1
            num_pages = self.cache.pages_needed(num_tokens)
            if request.arrival_step > self.step or not self.cache.can_allocate(num_pages):
                break
            request.pages = self.cache.allocate(num_pages)
            self._log(f"{request.name} joins: {len(request.prompt)} tokens, pages {request.pages}")
            admitted.append(waiting.pop(0))
        return admitted

    def _retire(self) -> None:
        """Lets finished requests go and frees their pages."""
        for request in [request for request in self._running if request.done]:
            self.cache.free(request.pages)
            self._running.remove(request)
            self._log(f"{request.name} leaves: {request.num_generated} tokens generated")

    def _prefill(self, requests: list[Request]) -> None:
        """One call for all prompts that join in this step."""
        start = time.perf_counter()
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        cu_seqlens = [0]
        for request in requests:
            length = len(request.prompt)
            request.tokens = list(request.prompt)
            tokens += request.prompt
            positions += range(length)
            slots += self.cache.slots(request.pages, 0, length)
            cu_seqlens.append(cu_seqlens[-1] + length)
        batch = PrefillBatch(
            tokens=self._tensor(tokens),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(slots),
            cu_seqlens=self._tensor(cu_seqlens, torch.int32),
            max_seqlen=max(len(request.prompt) for request in requests),
        )
        logits = self.model.prefill(batch).cpu()
        for request, row in zip(requests, logits, strict=True):
            request.add_token(row)
        self.throughput.prefill_tokens += len(tokens)
        self.throughput.prefill_seconds += time.perf_counter() - start

    def _decode(self, requests: list[Request]) -> None:
        """One token for each running request, whatever their lengths."""
        start = time.perf_counter()
        lengths = [len(request.tokens) for request in requests]  # keys, the new token included
        slots = [
            self.cache.slots(request.pages, length - 1, length)[0]
            for request, length in zip(requests, lengths, strict=True)
        ]
        batch = DecodeBatch(
            tokens=self._tensor([request.tokens[-1] for request in requests]),
            positions=self._tensor([length - 1 for length in lengths]),
            slot_mapping=self._tensor(slots),
            block_table=self.cache.block_table([request.pages for request in requests]),
            cache_seqlens=self._tensor(lengths, torch.int32),
            sched_meta=flash_mla.get_mla_metadata()[0],
        )
        logits = self.model.decode(batch).cpu()
        for request, row in zip(requests, logits, strict=True):
            request.add_token(row)
        self.throughput.decode_tokens += len(requests)
        self.throughput.decode_steps += 1
        self.throughput.decode_seconds += time.perf_counter() - start

    def _tensor(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.cache.device)

    def _log(self, line: str) -> None:
        self.log(f"  step {self.step:3d}  {line}")
