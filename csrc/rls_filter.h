// The NumPy entry points of the streaming filter.
#pragma once

#include <pybind11/pybind11.h>

namespace rlscuda {

void bind_rls_filter(pybind11::module_& m);

}  // namespace rlscuda
