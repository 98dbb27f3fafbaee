// The Python module: the instruction set, and every op's bindings.
#include <stdexcept>

#include "bindings.hpp"
#include "common/scratch.hpp"

namespace nb = nanobind;

namespace onchip {

namespace attention { void bind(nb::module_&); }
namespace causal_conv1d { void bind(nb::module_&); }
namespace hadamard { void bind(nb::module_&); }
namespace selective_scan { void bind(nb::module_&); }
namespace ssd { void bind(nb::module_&); }
void bind_steps(nb::module_&);

namespace {

using Named = std::pair<std::string, InstructionSet>;

// Best first.
std::vector<Named> supported() {
    std::vector<Named> sets;
#ifdef ONCHIP_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        sets.emplace_back("avx512", InstructionSet::avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        sets.emplace_back("avx2", InstructionSet::avx2);
#endif
    sets.emplace_back("baseline", InstructionSet::baseline);
    return sets;
}

std::vector<std::string> names() {
    std::vector<std::string> names;
    for (const auto& [name, set] : supported()) names.push_back(name);
    return names;
}

std::string name_in_use() {
    for (const auto& [name, set] : supported())
        if (set == instruction_set) return name;
    throw std::logic_error("the instruction set in use is one of those supported");
}

void use(const std::string& wanted) {
    for (const auto& [name, set] : supported()) {
        if (name == wanted) {
            instruction_set = set;
            return;
        }
    }
    throw std::invalid_argument("instruction set not supported by this processor: " + wanted);
}

}  // namespace

InstructionSet instruction_set = supported().front().second;

}  // namespace onchip

NB_MODULE(_native, m) {
    using namespace onchip;
    m.doc() = "onchip's native CPU kernels; the functions in onchip.ops are the way in.";
    m.def("instruction_sets", names, "Instruction sets this processor can run, best first.");
    m.def("instruction_set", name_in_use, "The instruction set in use.");
    m.def("use_instruction_set", use, "Use another of `instruction_sets`; for tests.");
    m.def("poison_scratch", poison_scratch, "Fill working memory with NaNs before every use; for tests.");
    attention::bind(m);
    causal_conv1d::bind(m);
    hadamard::bind(m);
    selective_scan::bind(m);
    ssd::bind(m);
    bind_steps(m);
}
