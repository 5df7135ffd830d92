"""Serves a small DeepSeek-V3 with flash_mla, and checks it against transformers.

    pip install -r requirements.txt
    python serve_deepseek_v3.py [--device auto|cpu|cuda] [--dtype float32|bfloat16] [--quick]

Several prompts are served at once: they arrive at different times, are prefilled together, decode
together over one paged latent cache, and leave; there are fewer pages than all of them need, so
pages of those who left serve those who come. The model has DeepSeek-V3's attention (16 heads, 512
latent and 64 RoPE columns, YaRN) and random weights from a fixed seed.

transformers generates the same requests first, one by one, with eager attention in float32. The
served model is then fed the reference's tokens, and its logits and choices are compared. Attention
and its cache are bfloat16; --dtype is that of everything else. float32 (the default) leaves
attention's error alone in the comparison; bfloat16 is how an engine runs, and has a wider bound.

Exits with 0 if all requests agree, 1 if not. The parts are in `mla_serving/`: start at `model.py`.
With FLASH_MLA_LOG=select in the environment, flash_mla tells which kernel serves each call.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch
from mla_serving.compare import compare, format_table, logit_bound
from mla_serving.model import ServingModel
from mla_serving.paged_cache import PagedLatentCache
from mla_serving.reference import encode, generate, make_config, make_model
from mla_serving.scheduler import Engine, Request

import flash_mla

SEED = 0
PAGE_SIZE = 64
NUM_PAGES = 11
MAX_BATCH = 4

TEXT = (
    "Multi-head Latent Attention keeps one latent vector per token instead of a key and a value "
    "for each head. The latent is normed before it is stored, and the rotary key beside it is "
    "already rotated, so a page of the cache is all that decoding ever reads. The up-projections "
    "of keys and values move into the query and the output, and every head attends the same 576 "
    "columns, of which the first 512 serve as the value too."
)

# (prompt, tokens to generate, engine step at which the request arrives)
WORKLOAD = [
    (TEXT[:130], 14, 0),
    ("Hello", 40, 0),
    (TEXT, 24, 0),
    (TEXT[:63], 20, 2),  # with BOS exactly one page: its first decoded token starts another
    ("", 32, 3),  # nothing but BOS
    ("Where do the pages of a finished request go?", 36, 5),
    (TEXT[100:355], 24, 8),
    (TEXT[200:], 32, 12),
]
QUICK_WORKLOAD = [
    (TEXT[:130], 5, 0),
    ("Hello", 10, 0),
    (TEXT[:260], 8, 1),
    (TEXT[:63], 6, 2),
    (TEXT[100:330], 6, 3),
]


def usable_device(wanted: str) -> torch.device:
    """The device to serve on; for "auto" the GPU if torch has one and flash_mla serves it."""
    if wanted != "auto":
        return torch.device(wanted)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda")
    try:
        with torch.inference_mode():
            config = make_config()
            cache = flash_mla.kv_cache_empty("bf16", 1, PAGE_SIZE, d_qk=576, device=device)
            one = torch.ones(1, dtype=torch.int32, device=device)
            q = torch.zeros(1, 1, config.num_attention_heads, 576, device=device).bfloat16()
            flash_mla.kv_cache_append(q[:, 0, :1], cache, one - 1)
            meta, _ = flash_mla.get_mla_metadata()
            flash_mla.flash_mla_with_kvcache(q, cache, one[:, None] - 1, one, 512, meta)
            q, cu_seqlens = q[0, :, :, :192], torch.cat([one - 1, one])
            flash_mla.flash_attn_varlen_func(q, q, q[:, :, :128], cu_seqlens, cu_seqlens, 1, 1)
    except NotImplementedError as reason:
        print(f"not on the GPU: {reason}")
        return torch.device("cpu")
    return device


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quick", action="store_true", help="fewer requests and tokens")
    args = parser.parse_args(argv)

    device = usable_device(args.device)
    dtype = getattr(torch, args.dtype)
    config = make_config()
    model = make_model(config, SEED).to(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"flash_mla {flash_mla.__version__} on {name}; attention in bfloat16, rest {args.dtype}")

    print("\ntransformers, eager attention, float32:")
    requests: list[Request] = []
    references: list[torch.Tensor] = []
    for i, (text, num_tokens, arrival) in enumerate(QUICK_WORKLOAD if args.quick else WORKLOAD):
        prompt = encode(text)
        start = time.perf_counter()
        tokens, logits = generate(model, prompt, num_tokens)
        seconds = time.perf_counter() - start
        print(f"  r{i}  {len(prompt)} + {num_tokens} tokens in {seconds:.1f} s", flush=True)
        requests.append(Request(f"r{i}", prompt, num_tokens, arrival, forced_tokens=tokens))
        references.append(logits)

    print("\nflash_mla, absorbed weights, one paged latent cache:")
    d_qk = config.kv_lora_rank + config.qk_rope_head_dim
    cache = PagedLatentCache(config.num_hidden_layers, NUM_PAGES, PAGE_SIZE, d_qk, device)
    served_model = ServingModel(copy.deepcopy(model).to(dtype), cache.layers)
    engine = Engine(served_model, cache, MAX_BATCH)
    engine.run(requests)

    bound = logit_bound(torch.cat(references), config.num_hidden_layers, dtype)
    results = [
        compare(request, logits, bound)
        for request, logits in zip(requests, references, strict=True)
    ]
    decided = sum(result.decided for result in results)
    total = sum(result.generated_tokens for result in results)
    spread = float(torch.cat(references).std())
    print(f"\nlogit bound {bound:.4f}; the logits' standard deviation is {spread:.2f}")
    print(f"undecided tokens, where the reference's choice leads by at most {4 * bound:.4f}:")
    for result in results:
        print(f"  {result.name}  {', '.join(result.undecided) or 'none'}")
    print(f"\n{format_table(results)}\n")

    speed = engine.throughput
    print(
        f"prefill {speed.prefill_tokens / speed.prefill_seconds:.0f} tokens/s, "
        f"decode {speed.decode_tokens / speed.decode_seconds:.0f} tokens/s "
        f"({speed.decode_tokens / speed.decode_steps:.1f} requests per step)"
    )
    print(
        f"pages: {cache.num_pages} of {PAGE_SIZE} tokens, {cache.pages_used} used, "
        f"{cache.pages_reused} times reused by a later request, {cache.pages_free} free at the end"
    )

    failures = [f"{result.name}: token {text}" for result in results for text in result.wrong]
    failures += [
        f"{result.name}: logits differ by {result.max_logit_diff:.4f}, more than {bound:.4f}"
        for result in results
        if not result.within_bound
    ]
    if cache.pages_reused == 0 or cache.pages_free != cache.num_pages:
        failures.append("pages were not reused, or not all returned")
    if 4 * decided < total:
        failures.append(f"only {decided} of {total} tokens are decided: this compares too little")
    for line in failures:
        print(f"MISMATCH  {line}")
    if not failures:
        print(
            f"all {len(results)} requests agree: {decided} of {total} tokens decided, all the same"
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
