// The two kernels of recursive least squares at each width of vectors, and the choice of one.
#include "rls_calls.h"

namespace rlscuda {

#define RLS_KERNELS(T, BYTES, TARGET)                                                          \
  TARGET void project_at(Width<BYTES>, Rows<const T> M, Rows<const T> S, Rows<T> U, int64_t n, \
                         int64_t r, int64_t i0, int64_t i1) {                                  \
    project<T, BYTES>(M, S, U, n, r, i0, i1);                                                  \
  }                                                                                            \
  TARGET void update_at(Width<BYTES>, Rows<T> M, Rows<const T> L, Rows<const T> V, int64_t n,  \
                        int64_t r, T scale, int64_t i0, int64_t i1) {                          \
    update<T, BYTES>(M, L, V, r, scale, i0, i1, 0, n);                                         \
  }
AT_EACH_WIDTH(RLS_KERNELS, float)
AT_EACH_WIDTH(RLS_KERNELS, double)
#undef RLS_KERNELS

template <class T>
void project_rows(Rows<const T> M, Rows<const T> S, Rows<T> U, int64_t n, int64_t r, int64_t i0,
                  int64_t i1) {
  at_width_of_rows<T>(n, [&](auto width) { project_at(width, M, S, U, n, r, i0, i1); });
}

template <class T>
void update_rows(Rows<T> M, Rows<const T> L, Rows<const T> V, int64_t n, int64_t r, T scale,
                 int64_t i0, int64_t i1) {
  at_width_of_rows<T>(n, [&](auto width) { update_at(width, M, L, V, n, r, scale, i0, i1); });
}

#define RLS_CALLS(T)                                                                             \
  template void project_rows(Rows<const T>, Rows<const T>, Rows<T>, int64_t, int64_t, int64_t,   \
                             int64_t);                                                           \
  template void update_rows(Rows<T>, Rows<const T>, Rows<const T>, int64_t, int64_t, T, int64_t, \
                            int64_t);
RLS_CALLS(float)
RLS_CALLS(double)
#undef RLS_CALLS

}  // namespace rlscuda
