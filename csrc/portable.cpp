#include "std.h"

#define LUMINA_ISA portable
#include "all_ops.h"
