"""The parts of the serving example; `serve_deepseek_v3.py` puts them together.

- `model`: a DeepSeek-V3 forward pass on `flash_mla`: prefill, and decode with absorbed weights.
- `paged_cache`: the latent KV cache in pages, and who owns which page.
- `scheduler`: continuous batching: requests join, decode together, leave.
- `reference`: the same model in transformers: config, seeded weights, eager attention.
- `compare`: served logits against the reference's.
"""
