// What the ops use of the standard library: included before an instruction set is turned on, so that no inline function
// of the library is compiled for a processor that may not be there.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops.h"

#ifdef LUMINA_X86
#include <immintrin.h>
#endif
