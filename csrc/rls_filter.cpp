// rls_filter_run: the streaming filter on NumPy arrays, without copies and without the GIL.
#include "rls_filter.h"

#include <pybind11/numpy.h>

#include "kernels.h"
#include "rls_checks.h"

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

// The arrays of a call: aligned, of strides in whole elements, and apart where one is written.
class Arrays {
 public:
  void add(const char* name, const py::array& array, bool written) {
    const auto item = array.itemsize();
    auto first = reinterpret_cast<intptr_t>(array.data()), last = first;
    bool whole = first % item == 0;
    for (py::ssize_t d = 0; d < array.ndim(); ++d) {
      const auto step = array.strides(d) * (array.shape(d) - 1);
      (step < 0 ? first : last) += step;
      whole = whole && array.strides(d) % item == 0;
    }
    if (array.size() == 0) return;
    RLS_CHECK(whole, name, " must be aligned, and its strides whole elements");
    for (const Use& other : uses_)
      RLS_CHECK(!(written || other.written) || last + item <= other.begin || other.end <= first,
                name, " and ", other.name, " must not share memory, since one of them is written");
    uses_.push_back({name, first, last + item, written});
  }

 private:
  struct Use {
    const char* name;
    intptr_t begin, end;
    bool written;
  };
  std::vector<Use> uses_;
};

template <class T>
void strides_of(const Strided<T>& array, int64_t stride[2]) {
  for (int d : {0, 1}) stride[d] = array.strides(d) / int64_t(sizeof(T));
}

// What is held of P [n, n]: `held` [K, n], of which K = 0 is none, and the state of it.
template <class T>
void check_held(const Dense<T>& P, const Dense<T>& held, const Dense<double>& state) {
  RLS_CHECK(P.ndim() == 2 && P.shape(0) == P.shape(1) && held.ndim() == 2 &&
                held.shape(0) <= kHeldRows && held.shape(1) == P.shape(1) && state.ndim() == 1 &&
                state.shape(0) == kHeldSlots,
            "shapes must be P [n, n], held [K, n], state [", kHeldSlots, "]");
}

template <class T>
std::pair<py::array_t<T>, int64_t> run(Dense<T> P, Dense<T> W, const Strided<T>& X,
                                       const Strided<T>& Y, double forgetting, double gain,
                                       double decay, double diffusion, double initial_scale,
                                       Dense<T> held, Dense<double> state) {
  const bool shaped = P.ndim() == 2 && W.ndim() == 2 && X.ndim() == 2 && Y.ndim() == 2;
  RLS_CHECK(shaped && P.shape(0) == P.shape(1) && W.shape(1) == P.shape(0) &&
                X.shape(1) == P.shape(0) && Y.shape(0) == X.shape(0) && Y.shape(1) == W.shape(0),
            "shapes must be P [n, n], W [n_out, n], X [T, n], Y [T, n_out]");
  RLS_CHECK(W.size() > 0, "W must not be empty, got [", W.shape(0), ", ", W.shape(1), "]");
  check_held(P, held, state);
  check_rule<T>({forgetting, gain, decay, diffusion, 0, initial_scale, false});
  Arrays arrays;
  arrays.add("X", X, false), arrays.add("Y", Y, false);
  arrays.add("P", P, true), arrays.add("W", W, true);
  arrays.add("held", held, true), arrays.add("state", state, true);
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
  args.held = held.mutable_data();
  args.held_state = reinterpret_cast<HeldState*>(state.mutable_data());
  args.hold = held.shape(0);
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
void flush(Dense<T> P, Dense<T> held, Dense<double> state) {
  check_held(P, held, state);
  Arrays arrays;
  arrays.add("P", P, true), arrays.add("held", held, false), arrays.add("state", state, true);
  RlsUpdate<T> layer{};
  layer.P = P.mutable_data();
  layer.batch = layer.rank = 1;
  layer.n = P.shape(0);
  layer.held = held.mutable_data();
  layer.held_state = reinterpret_cast<HeldState*>(state.mutable_data());
  layer.hold = held.shape(0);
  py::gil_scoped_release release;
  rls_flush_cpu(layer);
}

template <class T>
void bind_run(py::module_& m) {
  m.def("rls_filter_run", &run<T>, py::arg("P").noconvert(), py::arg("W").noconvert(),
        py::arg("X").noconvert(), py::arg("Y").noconvert(), py::arg("forgetting"), py::arg("gain"),
        py::arg("decay"), py::arg("diffusion"), py::arg("initial_scale"),
        py::arg("held").noconvert(), py::arg("state").noconvert(),
        "Filters a series, updating P and W in place; returns the predictions and the resets.");
  m.def("rls_filter_flush", &flush<T>, py::arg("P").noconvert(), py::arg("held").noconvert(),
        py::arg("state").noconvert(), "Applies to P what is held back of it.");
}

}  // namespace

void bind_rls_filter(py::module_& m) {
  bind_run<float>(m);
  bind_run<double>(m);
}

}  // namespace rlscuda
