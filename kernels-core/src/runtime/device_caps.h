// What a device can do, asked once per device and process.
#pragma once

#include "flash_mla/types.h"

namespace flash_mla {

struct DeviceCaps {
  int compute_capability = 0;  // 10 * major + minor; 0 on a CPU
  int num_sms = 0;
  int smem_per_block_bytes = 0;  // the opt-in limit of dynamic shared memory
};

// Invalid device indices, and CUDA devices in a build without CUDA, give an error.
Status device_caps(Device device, const DeviceCaps** caps);

}  // namespace flash_mla
