#include <ATen/Context.h>
#include <gmock/gmock.h>

int main(int argc, char** argv) {
  testing::InitGoogleMock(&argc, argv);
  // fp32 means fp32 in the tests: TF32, cuDNN's default, keeps 10 bits of a factor.
  at::globalContext().setAllowTF32CuBLAS(false);
  at::globalContext().setAllowTF32CuDNN(false);
  return RUN_ALL_TESTS();
}
