#include "unet/plain_message.h"

#include <stdexcept>
#include <string>

#include <gtest/gtest.h>

namespace sag {
namespace {

TEST(PlainMessage, KeepsTheInnermostMessageOnOneLine) {
  const std::string nested =
      "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript "
      "(most recent "
      "call last):\n  File \"x.py\", line 3, in forward\nRuntimeError: The following operation "
      "failed in the "
      "TorchScript interpreter.\nTraceback of TorchScript, original code:\n    cat\n    ~~~ <--- "
      "HERE\n"
      "RuntimeError: Sizes of tensors must match.\nExpected 2: got 3.\n\n";
  EXPECT_EQ(plain_message(std::runtime_error(nested)),
            "Sizes of tensors must match. Expected 2: got 3.");
  EXPECT_EQ(plain_message(std::runtime_error("bare: text")), "bare: text.");
  EXPECT_EQ(plain_message(std::runtime_error(
                "\nUnknown builtin op: a::b.\n:\n  File \"code.py\", line 1\n  a.b()\n")),
            "Unknown builtin op: a::b.");
}

TEST(PlainMessage, LeavesOutHowToDebugCuda) {
  EXPECT_EQ(plain_message(std::runtime_error(
                "CUDA error: operation not permitted when stream is capturing\nSearch for "
                "`cudaErrorStreamCaptureUnsupported' in https://docs.nvidia.com for more "
                "information.\nCUDA kernel errors might be asynchronously reported.\n")),
            "CUDA error: operation not permitted when stream is capturing.");
}

}  // namespace
}  // namespace sag
