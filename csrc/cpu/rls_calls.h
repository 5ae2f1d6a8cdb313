// The kernels of rls_kernels.h as functions, at the width of vectors that suits rows of n elements.
#pragma once

#include "rls_kernels.h"

namespace rlscuda {

// U = S M^T for rows [i0, i1) of M and all r rows of S.
template <class T>
void project_rows(Rows<const T> M, Rows<const T> S, Rows<T> U, int64_t n, int64_t r, int64_t i0,
                  int64_t i1);

// M <- scale (M - L^T V) for rows [i0, i1) of M, of r rows of L and V.
template <class T>
void update_rows(Rows<T> M, Rows<const T> L, Rows<const T> V, int64_t n, int64_t r, T scale,
                 int64_t i0, int64_t i1);

}  // namespace rlscuda
