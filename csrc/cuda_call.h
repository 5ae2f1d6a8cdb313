// Where an operator runs: on the CPU, or on a CUDA tensor's device and its current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "kernels.h"

namespace rlscuda {

bool on_cuda(const torch::stable::Tensor& t);

#ifdef RLSCUDA_WITH_CUDA
// The device of a tensor, made current for as long as this lives.
class CudaCall {
 public:
  explicit CudaCall(const torch::stable::Tensor& t);
  CudaStream stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  CudaStream stream_ = nullptr;
};
#endif

// Calls on_host(), or on_device(stream) with the device of t current. on_device takes its stream as
// `auto`, so that a build without CUDA never sees what it calls.
template <class Host, class Device>
auto run_on(const torch::stable::Tensor& t, const Host& on_host,
            [[maybe_unused]] const Device& on_device) {
#ifdef RLSCUDA_WITH_CUDA
  if (on_cuda(t)) {
    const CudaCall call(t);
    return on_device(call.stream());
  }
#endif
  return on_host();
}

}  // namespace rlscuda
