// Every op's kernels for one instruction set, and the set in use.
#pragma once

#include "attention/problem.hpp"
#include "causal_conv1d/problem.hpp"
#include "hadamard/problem.hpp"
#include "selective_scan/problem.hpp"
#include "ssd/problem.hpp"

namespace onchip {

struct InstructionSet {
    const char* name;
    attention::Kernels attention;
    causal_conv1d::Kernels causal_conv1d;
    hadamard::Kernels hadamard;
    selective_scan::Kernels selective_scan;
    ssd::Kernels ssd;
};

extern InstructionSet chosen;

}  // namespace onchip
