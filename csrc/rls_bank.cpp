// rls_filter_bank_: checks, dtype dispatch, launch.
#include "cuda_call.h"
#include "kernels.h"
#include "ops.h"
#include "rls_checks.h"

namespace rlscuda {
namespace {

template <class T>
RlsBank<T> bank_of(Arguments& arguments, const Tensor& P, const Tensor& W, const Tensor& state,
                   const Tensor& squares, const Tensor& rule) {
  RLS_CHECK(P.dim() == 3 && P.size(1) == P.size(2) && P.size(2) > 0,
            "P must be [b, n, n] with n > 0, got ", shape_of(P));
  RLS_CHECK(W.dim() == 3 && W.size(1) > 0, "W must be [b, n_out, n] with n_out > 0, got ",
            shape_of(W));
  RlsBank<T> bank{};
  bank.filters = P.size(0), bank.n = P.size(2), bank.n_out = W.size(1);
  check_shape("W", W, {bank.filters, bank.n_out, bank.n});
  check_shape("state", state, {bank.filters, kBankStateSlots});
  check_shape("squares", squares, {bank.filters, bank.n});
  check_shape("rule", rule, {bank.filters, kBankRuleSlots});
  check_same_dtype("W", W, "P", P);
  check_dtype("state", state, ScalarType::Double, "float64");
  check_dtype("squares", squares, ScalarType::Double, "float64");
  check_dtype("rule", rule, ScalarType::Double, "float64");
  bank.P = arguments.write<T>("P", P);
  bank.W = arguments.write<T>("W", W);
  bank.state = arguments.write<BankState>("state", state);
  bank.squares = arguments.write<double>("squares", squares);
  bank.rule = arguments.read<BankRule>("rule", rule);
  return bank;
}

template <class T>
void add_samples(Arguments& arguments, RlsBank<T>& bank, const Tensor& x, const Tensor& y,
                 const std::optional<Tensor>& weights, const std::optional<Tensor>& mask,
                 const std::optional<Tensor>& index, const Tensor& P) {
  bank.rows = bank.filters;
  if (index) {
    RLS_CHECK(index->dim() == 1, "index must be [k], got ", shape_of(*index));
    check_dtype("index", *index, ScalarType::Long, "int64");
    bank.index = arguments.read<int64_t>("index", *index);
    bank.rows = index->size(0);
  }
  if (x.dim() == 1) {
    check_shape("x", x, {bank.n});
  } else {
    check_shape("x", x, {bank.rows, bank.n});
    bank.x_stride = bank.n;
  }
  check_shape("y", y, {bank.rows, bank.n_out});
  check_same_dtype("x", x, "P", P);
  check_same_dtype("y", y, "P", P);
  bank.x = arguments.read<T>("x", x);
  bank.y = arguments.read<T>("y", y);
  if (weights) {
    check_shape("weights", *weights, {bank.rows});
    check_same_dtype("weights", *weights, "P", P);
    bank.weights = arguments.read<T>("weights", *weights);
  }
  if (mask) {
    check_shape("mask", *mask, {bank.rows});
    check_dtype("mask", *mask, ScalarType::Bool, "bool");
    bank.mask = arguments.read<bool>("mask", *mask);
  }
}

// What can be seen of the index on the CPU: filters that there are, none of them twice.
void check_index(const int64_t* index, int64_t rows, int64_t filters) {
  std::vector<int64_t> sorted(index, index + rows);
  std::sort(sorted.begin(), sorted.end());
  for (int64_t row = 0; row < rows; ++row) {
    RLS_CHECK(sorted[row] >= 0 && sorted[row] < filters, "index must be in [0, ", filters,
              "), got ", sorted[row]);
    RLS_CHECK(row == 0 || sorted[row] != sorted[row - 1], "index must name no filter twice, got ",
              sorted[row], " again");
  }
}

template <class T>
void check_values(const RlsBank<T>& bank) {
  if (bank.index) check_index(bank.index, bank.rows, bank.filters);
  const auto [row, fault] = rls_bank_fault_cpu(bank);
  RLS_CHECK(fault != kBadRule,
            "rule must have forgetting in (0, 1], gain > 0, ridge a number, initial_scale > 0, and "
            "all of them finite in the dtype of P, got another in row ",
            row);
  RLS_CHECK(fault != kBadWeight, "weights must be >= 0 and finite, got ",
            double(bank.weights ? bank.weights[row] : T(1)), " in row ", row);
  RLS_CHECK(fault == kNoFault, fault == kBadX ? "x" : "y",
            " must be finite, got NaN or inf in row ", row);
}

}  // namespace

Tensor rls_filter_bank_(Tensor P, Tensor W, Tensor state, Tensor squares, const Tensor& rule,
                        const Tensor& x, const Tensor& y, const std::optional<Tensor>& weights,
                        const std::optional<Tensor>& mask, const std::optional<Tensor>& index) {
  return dispatch_matrix(P, [&](auto zero) {
    using T = decltype(zero);
    Arguments arguments("P", P);
    RlsBank<T> bank = bank_of<T>(arguments, P, W, state, squares, rule);
    add_samples(arguments, bank, x, y, weights, mask, index, P);
    arguments.check_apart();
    Tensor predictions = new_tensor(P, {bank.rows, bank.n_out}, P.scalar_type());
    bank.predictions = static_cast<T*>(predictions.mutable_data_ptr());
    run_on(
        P,
        [&] {
          check_values(bank);
          rls_bank_cpu(bank);
        },
        [&](auto stream) {
          Tensor workspace = new_tensor(P, {bank.rows, bank.n}, P.scalar_type());
          rls_bank_cuda(bank, static_cast<T*>(workspace.mutable_data_ptr()), stream);
        });
    return predictions;
  });
}

}  // namespace rlscuda
