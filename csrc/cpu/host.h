// What the host gives the kernels: threads and scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quest {

using Body = void (*)(const void* context, int64_t begin, int64_t end);

// Runs body over [0, count), split into ranges among PyTorch's threads.
void run_parallel(int64_t count, Body body, const void* context);

template <class F>
void parallel_for(int64_t count, const F& f) {
  run_parallel(
      count,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
      },
      &f);
}

// The buffers of a thread. Two that are in use at once must differ.
enum class Scratch { kPlan, kPartials, kThread, kCount };

// The calling thread's own buffer of at least `bytes`, aligned to 64; its content is undefined.
void* scratch(Scratch which, size_t bytes);

}  // namespace quest
