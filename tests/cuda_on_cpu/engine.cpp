// The engine: blocks one after the other, the threads of a block as fibers that switch where they
// wait for one another. README.md says what it finds and what it cannot.
#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_call.h"
#include "cuda_runtime.h"

constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 256 << 10;  // bytes
constexpr int kWarp = 32;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<void, Free>;

// Every byte 255: NaN in each floating-point type, -1 in each integer type.
Bytes poisoned(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes ? bytes : 1)) throw std::bad_alloc();
  std::memset(p, 255, bytes);
  return Bytes(p);
}

struct Fiber {
  ucontext_t context;
  Bytes stack = Bytes(std::malloc(kStack));
  void* fake_stack = nullptr;
  void* resume_at[5];  // of __builtin_setjmp
  bool started;
  dim3 index;
  int number;  // of the thread in its block
  bool done;
  Wait wait;
  unsigned mask;
  uint64_t value, result;
  int source;
  Where where;
};

enum class Order { kAscending, kDescending, kShuffled };

Order order_asked_for() {
  const char* text = std::getenv("CUDA_ON_CPU_ORDER");
  const std::string order = text ? text : "ascending";
  if (order == "ascending") return Order::kAscending;
  if (order == "descending") return Order::kDescending;
  if (order == "shuffled") return Order::kShuffled;
  throw std::runtime_error("CUDA_ON_CPU_ORDER must be ascending, descending or shuffled, got " +
                           order);
}

class Engine {
 public:
  void run(const cudaLaunchConfig_t& config, void (*body)(const void*), const void* context) {
    body_ = body, context_ = context;
    blockDim = config.blockDim, gridDim = config.gridDim;
    count_ = int(blockDim.x * blockDim.y * blockDim.z);
    while (int(fibers_.size()) < count_) fibers_.push_back(std::make_unique<Fiber>());
    const int64_t blocks = int64_t(gridDim.x) * gridDim.y * gridDim.z;
    for (int64_t b : in_order(blocks)) {
      blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y),
                  unsigned(b / gridDim.x / gridDim.y)};
      dynamic_ = poisoned(config.dynamicSmemBytes);
      shared_.clear();
      run_block();
    }
    dynamic_.reset();
    shared_.clear();
  }

  void* shared(size_t bytes, Where where) {
    Bytes& memory =
        shared_[{where.file_name(), where.line(), where.column(), where.function_name()}];
    if (!memory) memory = poisoned(bytes);
    return memory.get();
  }
  void* dynamic_shared() { return dynamic_.get(); }
  int lane() const { return current_->number % kWarp; }

  uint64_t wait(Wait kind, unsigned mask, uint64_t value, int source, Where where) {
    Fiber& self = *current_;
    self.wait = kind, self.mask = mask, self.value = value, self.source = source;
    self.where = where;
    switch_to_engine(self, false);
    return self.result;
  }

 private:
  std::vector<int64_t> in_order(int64_t count) {
    std::vector<int64_t> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    if (order_ == Order::kDescending) std::reverse(numbers.begin(), numbers.end());
    if (order_ == Order::kShuffled) std::shuffle(numbers.begin(), numbers.end(), random_);
    return numbers;
  }

  void run_block() {
    for (int t = 0; t < count_; ++t) start(*fibers_[t], t);
    const auto order = in_order(count_);
    for (int left = count_; left > 0;) {
      bool ran = false;
      for (int64_t t : order) {
        Fiber& fiber = *fibers_[t];
        if (fiber.done || fiber.wait != Wait::kNothing) continue;
        resume(fiber);
        ran = true;
        if (fiber.done) {
          --left;
        } else if (fiber.wait != Wait::kBlock && release_warp(fiber)) {
          break;  // the first warp runs as far ahead of the others as barriers let it
        }
      }
      if (!ran) release_block();
    }
  }

  void start(Fiber& fiber, int number) {
    fiber.number = number;
    fiber.index = {number % blockDim.x, number / blockDim.x % blockDim.y,
                   number / blockDim.x / blockDim.y};
    fiber.done = fiber.started = false, fiber.wait = Wait::kNothing, fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Engine::enter, 0);
  }

  static void enter();

  [[gnu::noinline]] void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = fiber.index;
    __sanitizer_start_switch_fiber(&fake_stack_, fiber.stack.get(), kStack);
    if (!__builtin_setjmp(resume_at_)) jump_into(fiber);
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
  }

  // The first switch is one of ucontext, which makes a system call; the others are plain jumps.
  [[gnu::noinline]] static void jump_into(Fiber& fiber) {
    if (fiber.started) __builtin_longjmp(fiber.resume_at, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  [[gnu::noinline]] void jump_out() { __builtin_longjmp(resume_at_, 1); }

  [[gnu::noinline]] void switch_to_engine(Fiber& self, bool forever) {
    __sanitizer_start_switch_fiber(forever ? nullptr : &self.fake_stack, engine_stack_,
                                   engine_stack_size_);
    if (!__builtin_setjmp(self.resume_at)) jump_out();
    __sanitizer_finish_switch_fiber(self.fake_stack, &engine_stack_, &engine_stack_size_);
  }

  // Lets the lanes go that `last` waits for, if all of them have come to the same place.
  bool release_warp(Fiber& last) {
    Fiber* lanes[kWarp] = {};
    const int first = last.number / kWarp * kWarp;
    if (!(last.mask >> (last.number - first) & 1))
      fail("a collective of a thread whose own lane its mask lacks", last);
    for (int l = 0; l < kWarp; ++l) {
      if (!(last.mask >> l & 1)) continue;
      if (first + l >= count_) fail("a collective names lanes that the block does not have", last);
      lanes[l] = fibers_[first + l].get();
      if (lanes[l]->done) fail("a collective names lanes that have returned", last);
      if (lanes[l]->wait != last.wait || lanes[l]->mask != last.mask) return false;
      if (!same_place(*lanes[l], last)) return false;
    }
    for (Fiber* fiber : lanes)
      if (fiber) fiber->result = collective(lanes, *fiber);
    for (Fiber* fiber : lanes)
      if (fiber) fiber->wait = Wait::kNothing;
    return true;
  }

  uint64_t collective(Fiber* const* lanes, const Fiber& self) {
    if (self.wait == Wait::kShuffle) {
      if (!lanes[self.source]) fail("a shuffle reads from a lane that its mask lacks", self);
      return lanes[self.source]->value;
    }
    uint64_t result = self.wait == Wait::kMin ? ~uint64_t(0) : 0;
    for (int l = 0; l < kWarp; ++l) {
      if (!lanes[l]) continue;
      const uint64_t value = lanes[l]->value;
      if (self.wait == Wait::kBallot) result |= value << l;
      if (self.wait == Wait::kAdd) result += value;
      if (self.wait == Wait::kOr) result |= value;
      if (self.wait == Wait::kMin) result = std::min(result, value);
      if (self.wait == Wait::kMax) result = std::max(result, value);
    }
    return result;
  }

  // Nobody can run: all threads must be at one and the same barrier.
  void release_block() {
    const Fiber* waiting = nullptr;
    const Fiber* returned = nullptr;
    uint64_t sum = 0;
    for (int t = 0; t < count_; ++t) {
      const Fiber& fiber = *fibers_[t];
      if (fiber.done) {
        returned = &fiber;
        continue;
      }
      if (fiber.wait != Wait::kBlock) fail("a collective waits for lanes that do not come", fiber);
      if (waiting && !same_place(*waiting, fiber))
        fail("threads of one block wait at different barriers", fiber);
      waiting = &fiber;
      sum += fiber.value;
    }
    if (returned) fail("a barrier waits for threads that have returned", *waiting);
    for (int t = 0; t < count_; ++t) fibers_[t]->result = sum, fibers_[t]->wait = Wait::kNothing;
  }

  static bool same_place(const Fiber& a, const Fiber& b) {
    return a.where.line() == b.where.line() && a.where.column() == b.where.column() &&
           !std::strcmp(a.where.file_name(), b.where.file_name());
  }

  [[noreturn]] void fail(const std::string& what, const Fiber& fiber) {
    const auto text = [](const dim3& d) {
      return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
             ")";
    };
    const std::string message = std::string(fiber.where.file_name()) + ":" +
                                std::to_string(fiber.where.line()) + ": " + what + ": thread " +
                                text(fiber.index) + " of block " + text(blockIdx) + ", in " +
                                fiber.where.function_name();
    fibers_.clear();  // they will never return, so their stacks are of no more use
    throw std::runtime_error(message);
  }

  const Order order_ = order_asked_for();
  std::mt19937_64 random_;
  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
  int count_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  Bytes dynamic_;
  std::map<std::tuple<std::string, unsigned, unsigned, std::string>, Bytes> shared_;
  void* resume_at_[5];
  void* fake_stack_ = nullptr;
  const void* engine_stack_ = nullptr;
  size_t engine_stack_size_ = 0;
};

thread_local Engine engine;

void Engine::enter() {
  __sanitizer_finish_switch_fiber(nullptr, &engine.engine_stack_, &engine.engine_stack_size_);
  engine.body_(engine.context_);
  Fiber& self = *engine.current_;
  self.done = true;
  engine.switch_to_engine(self, true);
}

}  // namespace

// Where launches are written instead of being executed, a line each; null where they are executed.
std::FILE* record() {
  static std::FILE* const file = [] {
    const char* path = std::getenv("CUDA_ON_CPU_LAUNCHES");
    std::FILE* opened = path ? std::fopen(path, "a") : nullptr;
    if (path && !opened) throw std::runtime_error(std::string("cannot write to ") + path);
    return opened;
  }();
  return file;
}

// Offset of the kernel in the library, grid, block, bytes of dynamic shared memory, and those of its
// arguments that are integers.
cudaError_t write_launch(std::FILE* file, const cudaLaunchConfig_t& config, const void* kernel,
                         const std::string& integers) {
  Dl_info library{};
  if (!dladdr(kernel, &library)) throw std::runtime_error("a kernel outside of every library");
  const auto offset =
      reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase);
  const dim3 &b = config.blockDim, &g = config.gridDim;
  std::fprintf(file, "%zx %u %u %u %u %u %u %zu%s\n", size_t(offset), g.x, g.y, g.z, b.x, b.y, b.z,
               config.dynamicSmemBytes, integers.c_str());
  std::fflush(file);
  return cudaSuccess;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::string& integers,
                void (*body)(const void*), const void* context) {
  const dim3 &b = config.blockDim, &g = config.gridDim;
  const bool block_fits = b.x && b.y && b.z && uint64_t(b.x) * b.y * b.z <= 1024 && b.z <= 64;
  const bool grid_fits = g.x && g.y && g.z && g.x < 1u << 31 && g.y < 1u << 16 && g.z < 1u << 16;
  if (!block_fits || !grid_fits) return cudaErrorInvalidConfiguration;
  if (std::FILE* file = record()) return write_launch(file, config, kernel, integers);
  engine.run(config, body, context);
  return cudaSuccess;
}

void* shared(size_t bytes, Where where) { return engine.shared(bytes, where); }
void* dynamic_shared() { return engine.dynamic_shared(); }
uint64_t wait(Wait kind, unsigned mask, uint64_t value, int source, Where where) {
  return engine.wait(kind, mask, value, source, where);
}
int lane() { return engine.lane(); }

}  // namespace cuda_on_cpu

// In place of csrc/cuda_call.cpp: every tensor counts as one of a CUDA device.
namespace rlscuda {

bool on_cuda(const torch::stable::Tensor&) { return true; }
CudaCall::CudaCall(const torch::stable::Tensor&) {}

}  // namespace rlscuda
