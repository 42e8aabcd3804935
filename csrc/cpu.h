// What this processor can do, as the op files need to know it. Reads CPUID only; runs nothing.
#pragma once

namespace lumina {

// The widest instruction set that the ops have code for: "avx512", "avx2" or "portable".
const char* isa();

}  // namespace lumina
