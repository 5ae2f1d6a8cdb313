// What the CUDA half of the library was built with.
#include <cuda_runtime.h>

#include "kernels.h"

namespace rlscuda {

int cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace rlscuda
