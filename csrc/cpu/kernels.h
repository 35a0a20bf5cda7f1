// One kernel per stage, compiled once per instruction set (QUEST_ISA names the namespace).
#pragma once

#include "../params.h"

#define QUEST_DECLARE_KERNELS(isa)               \
  namespace isa {                                \
  void write_kv(const WriteKvParams&);           \
  void score(const ScoreParams&);                \
  void select(const SelectParams&);              \
  void sparse_decode(const SparseDecodeParams&); \
  }

namespace quest {

QUEST_DECLARE_KERNELS(baseline)
#ifdef __x86_64__
QUEST_DECLARE_KERNELS(x86_64_v3)
QUEST_DECLARE_KERNELS(x86_64_v4)
#endif

}  // namespace quest
