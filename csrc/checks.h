// Argument checks that say what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace rlscuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error (RuntimeError in Python) with the streamed message.
#define RLS_CHECK(cond, ...)                                         \
  do {                                                               \
    if (!(cond)) [[unlikely]]                                        \
      throw std::runtime_error(::rlscuda::concatenate(__VA_ARGS__)); \
  } while (0)

template <class... Args>
std::string concatenate(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline void check_shape(const char* name, const Tensor& t,
                        std::initializer_list<int64_t> expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  std::string text;
  int64_t i = 0;
  for (int64_t size : expected) {
    same = same && t.size(i) == size;
    text += (i++ ? ", " : "") + std::to_string(size);
  }
  RLS_CHECK(same, name, " must be [", text, "], got ", shape_of(t));
}

inline void check_contiguous(const char* name, const Tensor& t) {
  RLS_CHECK(t.is_contiguous(), name, " must be contiguous, got strides other than of a dense ",
            shape_of(t));
}

inline void check_same_dtype(const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  RLS_CHECK(t.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name,
            ", got another");
}

// A list with an entry for each of `count` layers; or none at all, where that is allowed.
inline void check_list_size(const char* name, const std::vector<Tensor>& list, size_t count,
                            bool may_be_empty = false) {
  RLS_CHECK(list.size() == count || (may_be_empty && list.empty()), name, " must have ", count,
            " tensors, got ", list.size());
}

inline void check_same_device(const char* name, const Tensor& t, const char* other_name,
                              const Tensor& other) {
  RLS_CHECK(t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(),
            name, " must be on the device of ", other_name, ", got another");
}

// A contiguous tensor of the given shape, uninitialised, on the device of `like`.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                         ScalarType dtype) {
  std::array<int64_t, 8> sizes{}, strides{};
  const int64_t dim = static_cast<int64_t>(shape.size());
  std::copy(shape.begin(), shape.end(), sizes.begin());
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace rlscuda
