// The device and stream of a call, from torch.
#include "cuda_call.h"

#include "checks.h"

// Absent from a torch without CUDA, where no tensor can be on a device that needs it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace rlscuda {

bool on_cuda(const Tensor& t) { return t.is_cuda(); }

CudaCall::CudaCall(const Tensor& t) {
  RLS_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "CUDA: this torch has none");
  guard_.emplace(t.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  stream_ = static_cast<CudaStream>(stream);
}

}  // namespace rlscuda
