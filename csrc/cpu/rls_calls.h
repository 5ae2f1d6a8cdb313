// The kernels of rls_kernels.h as functions, each compiled for every SIMD level.
#pragma once

#include "rls_kernels.h"

namespace rlscuda {

#define RLS_CALLS(T)                                                                        \
  void project_rows(Rows<const T> M, Rows<const T> S, Rows<T> U, int64_t n, int64_t r,      \
                    int64_t i0, int64_t i1);                                                \
  void update_rows(Rows<T> M, Rows<const T> L, Rows<const T> V, int64_t n, int64_t r, T scale, \
                   int64_t i0, int64_t i1);
RLS_CALLS(float)
RLS_CALLS(double)
#undef RLS_CALLS

}  // namespace rlscuda
