// Programmatic dependent launch (PTX griddepcontrol, sm_90 and later).
#pragma once

namespace flash_mla::sm90 {

// Returns once all kernels that this one depends on have run and their writes are visible. Before
// it, nothing of theirs may be read and nothing that they read may be written.
__device__ __forceinline__ void wait_for_predecessor() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next kernel of the stream begin, up to its own wait_for_predecessor().
__device__ __forceinline__ void launch_successor() {
  asm volatile("griddepcontrol.launch_dependents;");
}

}  // namespace flash_mla::sm90
