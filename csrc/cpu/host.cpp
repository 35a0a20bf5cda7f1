#include "host.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <new>

namespace quest {
namespace {

constexpr size_t kAlignment = 64;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Buffer {
  std::unique_ptr<void, Free> memory;
  size_t bytes = 0;
};

}  // namespace

void run_parallel(int64_t count, Body body, const void* context) {
  torch::stable::parallel_for(0, count, 1,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

void* scratch(Scratch which, size_t bytes) {
  thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];
  Buffer& buffer = buffers[static_cast<int>(which)];
  if (buffer.bytes < bytes) {
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    buffer.memory.reset(std::aligned_alloc(kAlignment, rounded));
    buffer.bytes = buffer.memory ? rounded : 0;
    if (!buffer.memory) throw std::bad_alloc();
  }
  return buffer.memory.get();
}

}  // namespace quest
