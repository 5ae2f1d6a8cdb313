// Memory of the CPU kernels: where there is none, the error says how much was asked for.
#pragma once

#include <cstddef>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace rlscuda {

template <class T>
struct ScratchAllocator {
  using value_type = T;
  ScratchAllocator() = default;
  template <class U>
  ScratchAllocator(const ScratchAllocator<U>&) {}
  T* allocate(size_t count) {
    void* memory = ::operator new(count * sizeof(T), std::nothrow);
    if (!memory)
      throw std::runtime_error("out of memory: no " + std::to_string(count * sizeof(T)) +
                               " bytes for a workspace");
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory); }
  template <class U>
  bool operator==(const ScratchAllocator<U>&) const {
    return true;
  }
};

template <class T>
using Scratch = std::vector<T, ScratchAllocator<T>>;

// What was cut from a workspace must lie in it.
template <class T>
void check_taken(const Scratch<T>& memory, const T* end) {
  if (end > memory.data() + memory.size()) throw std::logic_error("a workspace is too small");
}

}  // namespace rlscuda
