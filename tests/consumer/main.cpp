// Uses the library as another project would. It names no function of the file that registers
// sag::attention: the registration has to be there all the same, in a static sag too.

#include <iostream>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/types.h>

#include "sag/attention_map.h"
#include "sag/version.h"

int main() {
  const auto q = torch::ones({1, 2, 16, 4});
  const auto map = sag::attention_map(q, q);
  if (map.size(1) != 16) {
    std::cerr << "attention_map gave " << map.sizes() << '\n';
    return 1;
  }
  if (!c10::Dispatcher::singleton().findSchema({"sag::attention", ""})) {
    std::cerr << "sag::attention is not registered\n";
    return 1;
  }
  std::cout << "sag " << SAG_VERSION_MAJOR << '.' << SAG_VERSION_MINOR << '.' << SAG_VERSION_PATCH
            << ": the consumer works\n";
  return 0;
}
