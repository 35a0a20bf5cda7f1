// One kernel per stage, compiled once per instruction set (QUEST_ISA names the namespace).
#pragma once

#include <string>

#include "params.h"

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

struct Kernels {
  const char* isa;
  void (*write_kv)(const WriteKvParams&);
  void (*score)(const ScoreParams&);
  void (*select)(const SelectParams&);
  void (*sparse_decode)(const SparseDecodeParams&);
};

// The kernels for this machine: the widest instruction set it has, unless `use_isa` chose another.
const Kernels& kernels();

// Names of the instruction sets that this machine can run, widest first, separated by spaces.
std::string supported_isas();

// Chooses one of `supported_isas` for the whole process; false when it is none of them.
bool use_isa(const std::string& isa);

}  // namespace quest
