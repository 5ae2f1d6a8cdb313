// The streaming filter as a Python object over NumPy arrays, without copies and without the GIL.
#include "rls_filter.h"

#include <pybind11/complex.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "checks.h"
#include "kernels.h"

namespace rlscuda {
namespace {

namespace py = pybind11;

template <class T>
using Dense = py::array_t<T, py::array::c_style>;  // with noconvert: no copy, else TypeError
template <class T>
using Strided = py::array_t<T, 0>;
using Numbers = std::optional<Dense<double>>;

constexpr int64_t kReleaseGil = 1 << 12;  // numbers of P from which a call lets others run

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
    bool whole = first % array.dtype().alignment() == 0;
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

// The forms: what P is in memory, and the kernels over it.
template <class T>
struct Covariance {
  static constexpr int64_t kRows = kFilterRows;
  static int64_t learn(const RlsFilter<T>& f) { return rls_filter_cpu(f); }
  static void flush(const RlsFilter<T>& f) { rls_filter_flush_cpu(f); }
  static void variance(const RlsFilter<T>& f, double* out) { rls_filter_variance_cpu(f, out); }
};
template <class T>
struct SquareRoot {
  static constexpr int64_t kRows = 2 * kFilterRows;
  static int64_t learn(const RlsFilter<T>& f) { return rls_root_filter_cpu(f); }
  static void flush(const RlsFilter<T>& f) { rls_root_filter_flush_cpu(f); }
  static void variance(const RlsFilter<T>& f, double* out) { rls_root_filter_variance_cpu(f, out); }
};

// A filter over arrays that it keeps alive; its coefficients are plain numbers that Python checks.
template <class T, class Form>
class Filter {
 public:
  Filter(Dense<T> P, Dense<T> W, Dense<T> V, Dense<double> squares, Dense<double> state)
      : P_(P), W_(W), V_(V), squares_(squares), state_(state) {
    RLS_CHECK(P.ndim() == 2 && P.shape(0) == P.shape(1) && P.size() > 0 && W.ndim() == 2 &&
                  W.shape(1) == P.shape(0) && W.size() > 0 && V.ndim() == 2 &&
                  V.shape(0) == Form::kRows && V.shape(1) >= P.shape(0) && squares.ndim() == 1 &&
                  squares.shape(0) == P.shape(0) && state.ndim() == 1 &&
                  state.shape(0) == kFilterSlots,
              "shapes must be P [n, n], W [n_out, n], V [", Form::kRows,
              ", n or more], squares [n], state [", kFilterSlots, "]");
    arrays_.add("P", P_, true), arrays_.add("W", W_, true), arrays_.add("V", V_, true);
    arrays_.add("squares", squares_, true), arrays_.add("state", state_, true);
    filter_.P = P_.mutable_data();
    filter_.W = W_.mutable_data();
    filter_.V = V_.mutable_data();
    filter_.squares = squares_.mutable_data();
    filter_.state = reinterpret_cast<FilterState*>(state_.mutable_data());
    filter_.n = P.shape(0);
    filter_.n_out = W.shape(0);
    filter_.v_stride = V.shape(1);
    check_state();
  }

  double forgetting = 1, gain = 1, ridge = -1;

  // One sample; None where an argument has to be converted first, or the sample cannot be learnt.
  py::object update(py::handle x, py::handle y) {
    if (!is_vector(x, filter_.n)) return py::none();
    RlsFilter<T> f = filter();
    const auto input = py::reinterpret_borrow<Strided<T>>(x);
    f.X = input.data();
    f.x_stride[1] = input.strides(0) / int64_t(sizeof(T));
    T number;
    const bool scalar = filter_.n_out == 1 && is_number(y.ptr(), number);
    if (scalar) {
      f.Y = &number;
    } else {
      if (!is_vector(y, filter_.n_out)) return py::none();
      const auto target = py::reinterpret_borrow<Strided<T>>(y);
      f.Y = target.data();
      f.y_stride[1] = target.strides(0) / int64_t(sizeof(T));
    }
    f.samples = 1;
    if (nonfinite_row_cpu(f.X, 1, f.n, f.x_stride) >= 0 ||
        nonfinite_row_cpu(f.Y, 1, f.n_out, f.y_stride) >= 0)
      return py::none();
    py::array_t<T> prediction(scalar ? std::vector<py::ssize_t>{}
                                     : std::vector<py::ssize_t>{filter_.n_out});
    f.predictions = prediction.mutable_data();
    int64_t learnt;
    if (f.n * f.n < kReleaseGil) {
      learnt = Form::learn(f);
    } else {
      py::gil_scoped_release release;
      learnt = Form::learn(f);
    }
    return learnt ? py::object(prediction) : py::none();
  }

  // A series: the samples that were learnt are fewer than X has where the next one cannot be.
  int64_t run(const Strided<T>& X, const Strided<T>& Y, Dense<T> predictions, const Numbers& gains,
              const Numbers& forgettings, const std::optional<Dense<T>>& history) {
    RLS_CHECK(X.ndim() == 2 && Y.ndim() == 2 && X.shape(1) == filter_.n &&
                  Y.shape(0) == X.shape(0) && Y.shape(1) == filter_.n_out &&
                  predictions.ndim() == 2 && predictions.shape(0) == X.shape(0) &&
                  predictions.shape(1) == filter_.n_out,
              "shapes must be X [T, n], Y [T, n_out], predictions [T, n_out]");
    for (const Numbers* numbers : {&gains, &forgettings})
      RLS_CHECK(!*numbers || ((*numbers)->ndim() == 1 && (*numbers)->shape(0) == X.shape(0)),
                "gains and forgettings must be [T]");
    RLS_CHECK(!history || (history->ndim() == 3 && history->shape(0) == X.shape(0) &&
                           history->shape(1) == filter_.n_out && history->shape(2) == filter_.n),
              "history must be [T, n_out, n]");
    Arrays arrays = arrays_;
    arrays.add("X", X, false), arrays.add("Y", Y, false);
    arrays.add("predictions", predictions, true);
    if (gains) arrays.add("gains", *gains, false);
    if (forgettings) arrays.add("forgettings", *forgettings, false);
    if (history) arrays.add("history", *history, true);
    RlsFilter<T> f = filter();
    f.X = X.data();
    f.Y = Y.data();
    f.predictions = predictions.mutable_data();
    f.history = history ? const_cast<T*>(history->data()) : nullptr;
    f.gains = gains ? gains->data() : nullptr;
    f.forgettings = forgettings ? forgettings->data() : nullptr;
    f.samples = X.shape(0);
    for (int d : {0, 1}) {
      f.x_stride[d] = X.strides(d) / int64_t(sizeof(T));
      f.y_stride[d] = Y.strides(d) / int64_t(sizeof(T));
    }
    py::gil_scoped_release release;
    check_finite("X", f.X, f.samples, f.n, f.x_stride);
    check_finite("Y", f.Y, f.samples, f.n_out, f.y_stride);
    return Form::learn(f);
  }

  // x^H P x of every row.
  py::array_t<double> variance(const Strided<T>& X) {
    RLS_CHECK(X.ndim() == 2 && X.shape(1) == filter_.n, "X must be [T, n]");
    Arrays arrays = arrays_;
    arrays.add("X", X, false);
    RlsFilter<T> f = filter();
    f.X = X.data();
    f.samples = X.shape(0);
    for (int d : {0, 1}) f.x_stride[d] = X.strides(d) / int64_t(sizeof(T));
    py::array_t<double> out(X.shape(0));
    double* to = out.mutable_data();
    py::gil_scoped_release release;
    Form::variance(f, to);
    return out;
  }

  // Brings P up to date.
  void flush() {
    const RlsFilter<T> f = filter();
    py::gil_scoped_release release;
    Form::flush(f);
  }

 private:
  // What Python may have put into the state must not lead beyond V.
  void check_state() const {
    const FilterState& s = *filter_.state;
    RLS_CHECK(s.rows >= 0 && s.rows <= double(kFilterRows) && s.scale > 0 && s.turn.next >= 0 &&
                  s.turn.next < double(filter_.n) && s.turn.debt >= 0 &&
                  s.turn.debt <= double(filter_.n),
              "state must be that of a filter");
  }

  RlsFilter<T> filter() const {
    check_state();
    RLS_CHECK(forgetting > 0 && forgetting <= 1, "forgetting must be in (0, 1], got ", forgetting);
    RlsFilter<T> f = filter_;
    f.forgetting = forgetting;
    f.gain = gain;
    f.ridge = ridge;
    return f;
  }

  // Whether it is a Python number of this kind or one of NumPy, which is then read.
  bool is_number(PyObject* value, T& number) const {
    const bool own = reinterpret_cast<PyObject*>(Py_TYPE(value)) == scalar_.ptr();
    if constexpr (std::is_same_v<T, Real<T>>) {
      if (!own && !PyFloat_Check(value)) return false;
      number = T(PyFloat_AsDouble(value));
    } else {
      if (!own && !PyFloat_Check(value) && !PyComplex_Check(value)) return false;
      const Py_complex parts = PyComplex_AsCComplex(value);
      number = {Real<T>(parts.real), Real<T>(parts.imag)};
    }
    return true;
  }

  static bool is_vector(py::handle value, int64_t size) {
    if (!py::isinstance<Strided<T>>(value)) return false;
    const auto array = py::reinterpret_borrow<py::array>(value);
    return array.ndim() == 1 && array.shape(0) == size &&
           array.strides(0) % py::ssize_t(sizeof(T)) == 0 &&
           reinterpret_cast<uintptr_t>(array.data()) % alignof(T) == 0;
  }

  Dense<T> P_, W_, V_;
  Dense<double> squares_, state_;
  Arrays arrays_;
  py::object scalar_ = py::dtype::of<T>().attr("type");
  RlsFilter<T> filter_{};
};

template <class T, template <class> class Form>
void bind(py::module_& m, const char* name) {
  using F = Filter<T, Form<T>>;
  py::class_<F>(m, name)
      .def(py::init<Dense<T>, Dense<T>, Dense<T>, Dense<double>, Dense<double>>(),
           py::arg("P").noconvert(), py::arg("W").noconvert(), py::arg("V").noconvert(),
           py::arg("squares").noconvert(), py::arg("state").noconvert())
      .def_readwrite("forgetting", &F::forgetting)
      .def_readwrite("gain", &F::gain)
      .def_readwrite("ridge", &F::ridge)
      .def("update", &F::update, py::arg("x"), py::arg("y"))
      .def("run", &F::run, py::arg("X").noconvert(), py::arg("Y").noconvert(),
           py::arg("predictions").noconvert(), py::arg("gains").noconvert() = py::none(),
           py::arg("forgettings").noconvert() = py::none(),
           py::arg("history").noconvert() = py::none())
      .def("variance", &F::variance, py::arg("X").noconvert())
      .def("flush", &F::flush)
      .attr("rows") = Form<T>::kRows;
}

}  // namespace

void bind_rls_filter(py::module_& m) {
  bind<float, Covariance>(m, "Filter_float32");
  bind<double, Covariance>(m, "Filter_float64");
  bind<std::complex<float>, Covariance>(m, "Filter_complex64");
  bind<std::complex<double>, Covariance>(m, "Filter_complex128");
  bind<float, SquareRoot>(m, "RootFilter_float32");
  bind<double, SquareRoot>(m, "RootFilter_float64");
  m.attr("filter_rows") = kFilterRows;
  m.attr("filter_slots") = kFilterSlots;
}

}  // namespace rlscuda
