// The whole public API.
#pragma once

#include "flash_mla/cuda_stream.h"
#include "flash_mla/introspect.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/merge_attn_states.h"
#include "flash_mla/mha_prefill_dense.h"
#include "flash_mla/mla_decode_dense.h"
#include "flash_mla/mla_decode_sparse.h"
#include "flash_mla/mla_prefill_sparse.h"
#include "flash_mla/types.h"
