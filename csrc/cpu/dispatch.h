// Chooses, once per process, among the kernels compiled for several instruction sets.
#pragma once

#include <string>

#include "../params.h"

namespace quest {

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
