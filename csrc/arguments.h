// The tensors of a call: nothing gives out a pointer before device, bounds and overlaps are
// checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace rlscuda {

// Whether two elements of t are the same memory, as where it was expanded.
inline bool overlaps_itself(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < extent) return true;
    extent += stride * (size - 1);
  }
  return false;
}

// A dense copy of t.
inline Tensor dense_copy(const Tensor& t) {
  RLS_CHECK(t.dim() <= 8, "a tensor to copy must have at most 8 dimensions, got ", shape_of(t));
  Tensor copy = new_tensor(t, t.sizes(), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// Every pointer that an operator uses comes from here. A tensor must be on the device of the first
// and within its storage; what the call writes must share no memory with anything else it uses.
// What is only read may lie anyhow: `read` gives its elements in order, if need be of a copy that
// lives as long as this.
class Arguments {
 public:
  Arguments(const char* first_name, const Tensor& first) : first_name_(first_name) {
    RLS_CHECK(first.defined(), first_name, " must be a tensor, got none");
    type_ = device_type(first);
    index_ = first.get_device_index();
    uses_.reserve(16);
  }

  template <class T>
  const T* read(const char* name, const Tensor& t) {
    const void* data = note(name, t, false);
    if (t.is_contiguous()) return static_cast<const T*>(data);
    copies_.push_back(dense_copy(t));
    return static_cast<const T*>(copies_.back().const_data_ptr());
  }
  // In place: the caller follows the strides.
  const void* read_strided(const char* name, const Tensor& t) { return note(name, t, false); }

  template <class T>
  T* write(const char* name, const Tensor& t) {
    check_contiguous(name, t);
    return static_cast<T*>(note(name, t, true));
  }
  void* write_strided(const char* name, const Tensor& t) {
    RLS_CHECK(t.is_contiguous() || !overlaps_itself(t), name,
              " must not be expanded or overlap itself, got strides ",
              list_of(t.strides().data(), t.dim()), " of ", shape_of(t));
    return note(name, t, true);
  }

  // To be called when all are known, before anything is written.
  void check_apart() {
    std::sort(uses_.begin(), uses_.end(),
              [](const Use& a, const Use& b) { return a.begin < b.begin; });
    for (size_t i = 0; i < uses_.size(); ++i)
      for (size_t j = i + 1; j < uses_.size() && uses_[j].begin < uses_[i].end; ++j)
        RLS_CHECK(!(uses_[i].written || uses_[j].written) || side_by_side(uses_[i], uses_[j]),
                  uses_[i].name, " and ", uses_[j].name,
                  " must not share memory, since one of them is written");
  }

 private:
  struct Use {
    const char* name;
    const Tensor* tensor;
    uintptr_t begin, end;
    bool written;
  };

  static int32_t device_type(const Tensor& t) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    return type;
  }

  static int64_t element_size(const Tensor& t) {
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
    return int64_t(aoti_torch_dtype_element_size(dtype));
  }

  // Elements from the first to beyond the last.
  static int64_t extent(const Tensor& t) {
    if (t.is_contiguous()) return t.numel();
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t extent = 1;
    for (size_t d = 0; d < sizes.size(); ++d) extent += (sizes[d] - 1) * strides[d];
    return extent;
  }

  // Rows of one pitch, one's columns beside the other's, as a weight and a bias that are parts of
  // one matrix.
  static bool side_by_side(const Use& a, const Use& b) {
    const auto [pitch, row] = rows_of(a);
    const auto [other_pitch, other_row] = rows_of(b);
    const auto gap = int64_t(b.begin - a.begin) % std::max<int64_t>(1, pitch);
    return pitch == other_pitch && gap >= row && gap + other_row <= pitch;
  }

  // The largest stride and the extent of what it repeats, in bytes.
  static std::pair<int64_t, int64_t> rows_of(const Use& use) {
    const auto sizes = use.tensor->sizes(), strides = use.tensor->strides();
    int64_t pitch = 0, steps = 0;
    for (size_t d = 0; d < sizes.size(); ++d)
      if (sizes[d] > 1 && strides[d] > pitch) pitch = strides[d], steps = sizes[d] - 1;
    pitch *= element_size(*use.tensor);
    return {pitch, int64_t(use.end - use.begin) - pitch * steps};
  }

  void* note(const char* name, const Tensor& t, bool written) {
    RLS_CHECK(device_type(t) == type_ && t.get_device_index() == index_, name,
              " must be on the device of ", first_name_, ", got another");
    if (t.numel() == 0) return nullptr;
    int64_t bytes, size = element_size(t);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
    const int64_t elements = extent(t);
    RLS_CHECK(t.storage_offset() + elements <= bytes / size, name, " ", shape_of(t), " needs ",
              t.storage_offset() + elements, " elements of storage, got ", bytes / size);
    void* data = written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
    RLS_CHECK(data, name, " must have memory of its own, got none for ", shape_of(t));
    const auto begin = reinterpret_cast<uintptr_t>(data);
    uses_.push_back({name, &t, begin, begin + uintptr_t(elements * size), written});
    return data;
  }

  const char* first_name_;
  int32_t type_, index_;
  std::vector<Use> uses_;
  std::vector<Tensor> copies_;
};

}  // namespace rlscuda
