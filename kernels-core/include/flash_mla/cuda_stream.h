// What the owner of workspace must know of a CUDA stream.
#pragma once

#include "flash_mla/types.h"

namespace flash_mla {
inline namespace v0 {

// The id of the capture that the stream is part of, unique in this process; 0 when the stream does
// not capture a graph. A build without CUDA says kUnsupported.
//
// Workspace::sync of a captured call is for the graph alone, since its replays may overlap with the
// stream's other launches: keep one block for each capture and stream, zeroed by a node that is
// captured before its first use.
FLASH_MLA_API Status stream_capture_id(Stream stream, uint64_t* id);

}  // namespace v0
}  // namespace flash_mla
