// conv_ops._C: what torch.ops cannot carry (build information, settings, plans, tuned choices) as
// plain Python objects. Includes no torch header; conv_ops/_C.pyi has the types.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "plan.h"
#include "settings.h"

namespace py = pybind11;

namespace convops {
namespace {

using PyTensorInfo =
    std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::string, std::string, int>;

[[noreturn]] void refuse(const std::string& name, const std::string& expected,
                         const std::string& value) {
  throw py::value_error("expected " + name + " to be " + expected + ", but got " + name + "=" +
                        value);
}

template <typename Enum>
Enum parsed(std::optional<Enum> (*parse)(const std::string&), const std::string& name,
            const std::string& expected, const std::string& value) {
  const std::optional<Enum> result = parse(value);
  if (!result) refuse(name, expected, '\'' + value + '\'');
  return *result;
}

TensorInfo tensor_info(const PyTensorInfo& info) {
  const auto& [sizes, strides, dtype, device, index] = info;
  return {sizes, strides,
          parsed(parse_dtype, "dtype", "float32, float64, float16 or bfloat16", dtype),
          parsed(parse_device_type, "device", "cpu or cuda", device), index};
}

std::optional<Precision> precision_of(const py::object& value) {
  if (value.is_none()) return std::nullopt;
  return parsed(parse_precision, "precision", "'ieee', 'tf32' or None", py::str(value));
}

settings::Overrides overrides_of(const py::dict& values) {
  settings::Overrides result;
  result.precision = precision_of(values["precision"]);
  result.algorithm = values["algorithm"].cast<std::optional<std::string>>();
  result.workspace_limit = values["workspace_limit"].cast<std::optional<int64_t>>();
  result.autotune = values["autotune"].cast<std::optional<bool>>();
  if (result.workspace_limit && *result.workspace_limit < 0)
    refuse("workspace_limit", "a number of bytes, 0 or more",
           std::to_string(*result.workspace_limit));
  return result;
}

template <typename Settings>
py::dict settings_dict(const Settings& values) {
  py::dict result;
  result["precision"] =
      values.precision ? py::object(py::str(to_string(*values.precision))) : py::object(py::none());
  result["algorithm"] = values.algorithm;
  result["workspace_limit"] = values.workspace_limit;
  result["autotune"] = values.autotune;
  return result;
}

bool is_process(const std::string& scope) {
  if (scope != "process" && scope != "thread")
    refuse("scope", "'process' or 'thread'", '\'' + scope + '\'');
  return scope == "process";
}

py::dict get_settings(const std::string& scope) {
  return is_process(scope) ? settings_dict(settings::process_values())
                           : settings_dict(settings::thread_overrides());
}

void set_settings(const std::string& scope, const py::dict& values) {
  const settings::Overrides overrides = overrides_of(values);
  if (!is_process(scope)) {
    settings::thread_overrides() = overrides;
    return;
  }
  if (!overrides.workspace_limit) refuse("workspace_limit", "a number of bytes", "None");
  if (!overrides.autotune) refuse("autotune", "True or False", "None");
  settings::set_process_values(
      {overrides.precision, overrides.algorithm, *overrides.workspace_limit, *overrides.autotune});
}

// The callable outlives the interpreter's shutdown order by never being destroyed.
py::object& precision_callable() {
  static auto* callable = new py::object(py::none());
  return *callable;
}

Precision read_precision_from_python() {
  py::gil_scoped_acquire gil;
  const py::object value = precision_callable()();
  return precision_of(value).value_or(Precision::kTf32);
}

void set_torch_precision_reader(const py::object& callable) {
  precision_callable() = callable;
  settings::set_torch_precision_reader(callable.is_none() ? nullptr : read_precision_from_python);
}

py::list algorithms() {
  py::list result;
  for (DeviceType type : {DeviceType::kCpu, DeviceType::kCuda}) {
    if (!has_runtime(type)) continue;
    for (const auto& algorithm : runtime(type).algorithms()) {
      py::dict entry;
      entry["name"] = algorithm->name();
      entry["device"] = to_string(type);
      result.append(entry);
    }
  }
  return result;
}

py::object milliseconds(const std::optional<double>& seconds) {
  return seconds ? py::object(py::float_(*seconds * 1e3)) : py::object(py::none());
}

py::dict explain(const std::string& direction_name, const PyTensorInfo& input,
                 const PyTensorInfo& weight, const std::optional<PyTensorInfo>& output,
                 bool has_bias, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                 int64_t groups, const std::optional<std::string>& precision) {
  const Direction direction =
      parsed(parse_direction, "direction", "'forward', 'backward_input' or 'backward_weight'",
             direction_name);
  const TensorInfo x = tensor_info(input), w = tensor_info(weight);
  const ConvArguments arguments{stride, padding, dilation, groups};
  const TensorInfo bias{{w.sizes.empty() ? 0 : w.sizes[0]}, {1}, x.dtype, x.device, x.device_index};
  ConvProblem problem = forward_problem(x, w, has_bias ? &bias : nullptr, arguments);
  if (direction != Direction::kForward) {
    TensorInfo y{{problem.output.size, problem.output.size + 4},
                 {problem.output.stride, problem.output.stride + 4},
                 x.dtype,
                 x.device,
                 x.device_index};
    if (output) y = tensor_info(*output);
    problem = direction == Direction::kBackwardInput
                  ? backward_input_problem(y, w, x.sizes, arguments)
                  : backward_weight_problem(y, x, w.sizes, w.strides, arguments);
  }
  if (x.dtype == DType::kFloat32 && x.device == DeviceType::kCuda) {
    const auto chosen =
        precision ? precision_of(py::str(*precision)) : settings::effective().precision;
    problem.precision = chosen.value_or(settings::torch_precision());
  }

  py::list candidates;
  for (const plan::Candidate& candidate :
       plan::candidates(problem, x.device, x.device_index, std::nullopt)) {
    const bool can_run = candidate.reason.empty();
    py::dict entry;
    entry["algorithm"] = candidate.algorithm->name();
    entry["reason"] = candidate.reason;
    entry["predicted_ms"] = can_run ? milliseconds(candidate.predicted_seconds) : py::none();
    entry["measured_ms"] = milliseconds(candidate.measured_seconds);
    entry["workspace"] = can_run ? py::object(py::int_(candidate.workspace)) : py::none();
    entry["chosen"] = candidate.chosen;
    candidates.append(entry);
  }
  py::dict result;
  result["problem"] = to_string(problem);
  result["device"] = runtime(x.device).device(x.device_index).name;
  result["candidates"] = candidates;
  return result;
}

py::dict choice_dict(const plan::TunedChoice& choice) {
  py::dict result;
  result["device"] = choice.device;
  result["problem"] = choice.problem;
  result["algorithm"] = choice.algorithm;
  result["milliseconds"] = choice.milliseconds;
  return result;
}

py::list tuned_choices() {
  py::list result;
  for (const plan::TunedChoice& choice : plan::tuned_choices()) result.append(choice_dict(choice));
  return result;
}

void load_tuned_choices(const std::vector<py::dict>& choices) {
  std::vector<plan::TunedChoice> loaded;
  for (const py::dict& choice : choices)
    loaded.push_back({choice["device"].cast<std::string>(), choice["problem"].cast<std::string>(),
                      choice["algorithm"].cast<std::string>(),
                      choice["milliseconds"].cast<std::map<std::string, double>>()});
  plan::load_tuned_choices(loaded);
}

void set_tuned_callback(const py::object& callable) {
  if (callable.is_none()) return plan::set_tuned_callback(nullptr);
  // Ops run without the GIL: take it to call, and to drop the last reference.
  const std::shared_ptr<py::object> shared(new py::object(callable), [](py::object* object) {
    py::gil_scoped_acquire gil;
    delete object;
  });
  plan::set_tuned_callback([shared](const plan::TunedChoice& choice) {
    py::gil_scoped_acquire gil;
    (*shared)(choice_dict(choice));
  });
}

py::dict build_info() {
  py::dict result;
  result["version"] = CONVOPS_VERSION;
  result["compiler"] = "gcc " __VERSION__;
  result["cpp_standard"] = __cplusplus;
  return result;
}

py::object cuda_build_info() {
  if (!has_runtime(DeviceType::kCuda)) return py::none();
  py::dict result;
  const BuildInfo info = runtime(DeviceType::kCuda).build_info();
  result["architectures"] = info.architectures;
  result["cuda_version"] = info.toolkit;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ side of conv_ops: settings, plans and build information.";
  m.def("build_info", &build_info);
  m.def("cuda_build_info", &cuda_build_info);
  m.def("get_settings", &get_settings, py::arg("scope"));
  m.def("set_settings", &set_settings, py::arg("scope"), py::arg("settings"));
  m.def("effective_settings", [] { return settings_dict(settings::effective()); });
  m.def("set_torch_precision_reader", &set_torch_precision_reader, py::arg("callable"));
  m.def("algorithms", &algorithms);
  m.def("explain", &explain, py::arg("direction"), py::arg("input"), py::arg("weight"),
        py::arg("output"), py::arg("has_bias"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("precision"));
  m.def("tuned_choices", &tuned_choices);
  m.def("load_tuned_choices", &load_tuned_choices, py::arg("choices"));
  m.def("clear_tuned_choices", &plan::clear_tuned_choices);
  m.def("set_tuned_callback", &set_tuned_callback, py::arg("callable"));
  // The callback may hold Python objects: let go of them while there is an interpreter.
  m.add_object("_cleanup", py::capsule([] { plan::set_tuned_callback(nullptr); }));
}

}  // namespace convops
