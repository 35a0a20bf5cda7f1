#include "dispatch.h"

#include "kernels.h"

namespace quest {
namespace {

#define QUEST_KERNELS(isa)                                                         \
  {#isa,        isa::write_kv,     isa::write_codes, isa::score, isa::score_codes, \
   isa::select, isa::sparse_decode}

#ifdef __x86_64__
// F16C is not checked: every CPU with AVX2 has it, and clang before 15 does not know its name.
bool has_x86_64_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_x86_64_v4() {
  return has_x86_64_v3() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Variant {
  Kernels kernels;
  bool (*supported)();
};

// Widest first; the last runs anywhere.
const Variant kVariants[] = {
#ifdef __x86_64__
    {QUEST_KERNELS(x86_64_v4), has_x86_64_v4},
    {QUEST_KERNELS(x86_64_v3), has_x86_64_v3},
#endif
    {QUEST_KERNELS(baseline), [] { return true; }},
};

const Kernels* widest() {
  for (const Variant& variant : kVariants) {
    if (variant.supported()) return &variant.kernels;
  }
  return nullptr;
}

const Kernels*& chosen() {
  static const Kernels* kernels = widest();
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

std::string supported_isas() {
  std::string names;
  for (const Variant& variant : kVariants) {
    if (variant.supported()) names += (names.empty() ? "" : " ") + std::string(variant.kernels.isa);
  }
  return names;
}

bool use_isa(const std::string& isa) {
  for (const Variant& variant : kVariants) {
    if (isa == variant.kernels.isa && variant.supported()) {
      chosen() = &variant.kernels;
      return true;
    }
  }
  return false;
}

}  // namespace quest
