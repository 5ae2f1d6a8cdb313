// Argument checks that say what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
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

inline std::string list_of(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

inline std::string shape_of(const Tensor& t) { return list_of(t.sizes().data(), t.dim()); }

// The dtype as Python names it.
inline std::string dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return toString(t.scalar_type());
  }
}

inline void check_shape(const char* name, const Tensor& t,
                        std::initializer_list<int64_t> expected) {
  const int64_t dim = static_cast<int64_t>(expected.size());
  RLS_CHECK(t.dim() == dim && std::equal(expected.begin(), expected.end(), t.sizes().data()), name,
            " must be ", list_of(expected.begin(), dim), ", got ", shape_of(t));
}

inline void check_contiguous(const char* name, const Tensor& t) {
  RLS_CHECK(t.is_contiguous(), name, " must be contiguous, got strides ",
            list_of(t.strides().data(), t.dim()), " of ", shape_of(t));
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType dtype, const char* expected) {
  RLS_CHECK(t.scalar_type() == dtype, name, " must be ", expected, ", got ", dtype_of(t));
}

inline void check_same_dtype(const char* name, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  RLS_CHECK(t.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name,
            ", ", dtype_of(other), ", got ", dtype_of(t));
}

// A list with an entry for each of `count` layers; or none at all, where that is allowed.
inline void check_list_size(const char* name, const std::vector<Tensor>& list, size_t count,
                            bool may_be_empty = false) {
  RLS_CHECK(list.size() == count || (may_be_empty && list.empty()), name, " must have ", count,
            " tensors, got ", list.size());
}

// A number that the compute type T can hold; NaN is none.
template <class T>
void check_number(const char* name, double value) {
  RLS_CHECK(std::abs(value) <= double(std::numeric_limits<T>::max()), name,
            " must be a finite number of the compute dtype, got ", value);
}

// A contiguous tensor of the given shape, uninitialised, on the device of `like`.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                         ScalarType dtype) {
  std::array<int64_t, 8> sizes{}, strides{};
  const int64_t dim = static_cast<int64_t>(shape.size());
  std::copy(shape.begin(), shape.end(), sizes.begin());
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int64_t stride = 1, bytes = 0;
  bool fits = true;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    fits = fits && !__builtin_mul_overflow(stride, std::max<int64_t>(1, sizes[i]), &stride);
  }
  fits =
      fits && !__builtin_mul_overflow(stride, int64_t(aoti_torch_dtype_element_size(type)), &bytes);
  RLS_CHECK(fits, "out of memory: a result ", list_of(sizes.data(), dim),
            " has more bytes than can be counted");
  AtenTensorHandle handle;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const AOTITorchError status = aoti_torch_empty_strided(
      dim, sizes.data(), strides.data(), type, device_type, like.get_device_index(), &handle);
  RLS_CHECK(status == AOTI_TORCH_SUCCESS, "out of memory: no ", bytes, " bytes for a result ",
            list_of(sizes.data(), dim));
  return Tensor(handle);
}

}  // namespace rlscuda
