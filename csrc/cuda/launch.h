// The one place from which kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace rlscuda {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here, not by whoever asks next
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

// A grid of so many blocks along x.
inline dim3 grid_of(int64_t blocks) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  if (blocks > kMost) throw std::runtime_error("a tensor is too large for one CUDA launch");
  return dim3(unsigned(blocks));
}

// Launches kernel(args...) and throws std::runtime_error where that fails. Every kernel may use
// the dynamic shared memory that it asks for, up to the limit of the device.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, const Args&... args) {
  constexpr size_t kGranted = 48 << 10;  // bytes of dynamic shared memory without opting in
  if (shared_bytes > kGranted)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shared_bytes)),
               "dynamic shared memory of a kernel");
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...),
             "launch of a kernel");
}

}  // namespace rlscuda
