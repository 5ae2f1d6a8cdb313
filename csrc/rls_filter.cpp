// rls_filter_run: the streaming filter on NumPy arrays, without copies and without the GIL.
#include "rls_filter.h"

#include <pybind11/numpy.h>

#include "checks.h"
#include "kernels.h"

namespace rlscuda {
namespace {

namespace py = pybind11;

template <class T>
using Dense = py::array_t<T, py::array::c_style>;  // with noconvert: no copy, else TypeError
template <class T>
using Strided = py::array_t<T, 0>;

template <class T>
void check_finite(const char* name, const T* data, int64_t rows, int64_t cols,
                  const int64_t stride[2]) {
  const int64_t row = nonfinite_row_cpu(data, rows, cols, stride);
  if (row >= 0)
    throw std::invalid_argument(
        concatenate(name, " must be finite, got NaN or inf in sample ", row));
}

template <class T>
void strides_of(const Strided<T>& array, int64_t stride[2]) {
  for (int d : {0, 1}) stride[d] = array.strides(d) / int64_t(sizeof(T));
}

template <class T>
std::pair<py::array_t<T>, int64_t> run(Dense<T> P, Dense<T> W, const Strided<T>& X,
                                       const Strided<T>& Y, double forgetting, double gain,
                                       double decay, double diffusion, double initial_scale) {
  const bool shaped = P.ndim() == 2 && W.ndim() == 2 && X.ndim() == 2 && Y.ndim() == 2;
  RLS_CHECK(shaped && P.shape(0) == P.shape(1) && W.shape(1) == P.shape(0) &&
                X.shape(1) == P.shape(0) && Y.shape(0) == X.shape(0) && Y.shape(1) == W.shape(0),
            "shapes must be P [n, n], W [n_out, n], X [T, n], Y [T, n_out]");
  py::array_t<T> predictions({X.shape(0), W.shape(0)});
  RlsFilter<T> args{P.mutable_data(),           W.mutable_data(), X.data(),   Y.data(),
                    predictions.mutable_data(), X.shape(0),       X.shape(1), W.shape(0)};
  strides_of(X, args.x_stride);
  strides_of(Y, args.y_stride);
  args.forgetting = forgetting;
  args.gain = gain;
  args.decay = decay;
  args.diffusion = diffusion;
  args.initial_scale = initial_scale;
  int64_t resets = 0;
  {
    py::gil_scoped_release release;
    check_finite("X", args.X, args.samples, args.n, args.x_stride);
    check_finite("Y", args.Y, args.samples, args.n_out, args.y_stride);
    resets = rls_filter_cpu(args);
  }
  return {predictions, resets};
}

template <class T>
void bind_run(py::module_& m) {
  m.def("rls_filter_run", &run<T>, py::arg("P").noconvert(), py::arg("W").noconvert(),
        py::arg("X").noconvert(), py::arg("Y").noconvert(), py::arg("forgetting"), py::arg("gain"),
        py::arg("decay"), py::arg("diffusion"), py::arg("initial_scale"),
        "Filters a series, updating P and W in place; returns the predictions and the resets.");
}

}  // namespace

void bind_rls_filter(py::module_& m) {
  bind_run<float>(m);
  bind_run<double>(m);
}

}  // namespace rlscuda
