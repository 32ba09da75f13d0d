// What every kernel file includes. Each is compiled once for every instruction set, with
// HPCSYNC_ISA naming the namespace; dispatch.cpp chooses among them at run time.
//
// Functions of headers that end up in these objects must be static or in an anonymous namespace:
// the linker would else keep one copy of an inline function for all, of any instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../hpcsync_kernels.h"

#define KERNEL(result, name, parameters, arguments) result name parameters;
namespace HPCSYNC_ISA {
#include "kernels.def"
}
#undef KERNEL
