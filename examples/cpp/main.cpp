// Runs a TorchScript program that uses conv_ops, forward and backward, in a process without Python,
// and compares with what Python got.
//
//   convops_example PROGRAM REFERENCE LIBRARY...
#include <dlfcn.h>
#include <torch/script.h>

#include <iostream>
#include <stdexcept>
#include <string>

namespace {

// conv_ops' libraries register their ops when they are loaded; nothing is called by name.
void load_library(const std::string& path) {
  if (!dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
}

// Prints how far a tensor is from what it should be; throws if that is too far.
void compare(const std::string& name, const at::Tensor& actual, const at::Tensor& expected) {
  if (!actual.defined()) throw std::runtime_error("there is no " + name);
  const double error = ((actual - expected).abs().max() / expected.abs().max()).item<double>();
  std::cout << name << ' ' << actual.sizes() << ": relative error " << error << '\n';
  if (!(error < 1e-5)) throw std::runtime_error(name + " differs from the reference");
}

void run(int argc, char** argv) {
  if (argc < 4) throw std::runtime_error("usage: convops_example PROGRAM REFERENCE LIBRARY...");
  for (int i = 3; i < argc; ++i) load_library(argv[i]);

  torch::jit::Module program = torch::jit::load(argv[1]);
  const torch::jit::Module reference = torch::jit::load(argv[2]);
  const auto expected = [&](const std::string& name) { return reference.attr(name).toTensor(); };

  const at::Tensor input = expected("input").clone().requires_grad_();
  const at::Tensor output = program.forward({input}).toTensor();
  compare("output", output, expected("output"));

  output.square().sum().backward();
  compare("gradient of the input", input.grad(), expected("input_gradient"));
  for (const auto& parameter : program.named_parameters()) {
    std::string name = parameter.name;
    for (char& c : name)
      if (c == '.') c = '_';
    compare("gradient of " + parameter.name, parameter.value.grad(), expected(name + "_gradient"));
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  std::cout << "as in Python\n";
}
