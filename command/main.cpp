// The command sag-sample: draws pictures with a diffusion model, steered by Self-Attention
// Guidance.

#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <string>

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include "command.h"
#include "command_line.h"
#include "errors.h"
#include "interrupt.h"
#include "messages.h"

namespace {

constexpr int kDone = 0, kMistake = 1, kFailed = 2;

constexpr const char* kNoMemory =
    "There is not enough memory: a smaller --max-rows, --batch or --height and --width needs less; "
    "on CUDA --dtype fp16 does, too.";

int fail(int code, const std::string& sentence) {
  fmt::print(stderr, "sag-sample: {}\n", sentence);
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto choices = sag_sample::parse_command_line({argv + 1, argv + argc}, std::cout);
    if (!choices) return kDone;
    sag_sample::catch_interrupts(choices->contains("--quiet"));
    sag_sample::run_command(*choices, std::cout);
    return kDone;
  } catch (const sag_sample::UsageError& error) {
    return fail(kMistake, error.what());
  } catch (const sag_sample::RunError& error) {
    return fail(kFailed, error.what());
  } catch (const c10::ValueError& error) {
    // What the library says of its arguments, which are the user's.
    return fail(kMistake, sag_sample::sentence_of(error));
  } catch (const c10::TypeError& error) {
    return fail(kMistake, sag_sample::sentence_of(error));
  } catch (const c10::IndexError& error) {
    return fail(kMistake, sag_sample::sentence_of(error));
  } catch (const c10::OutOfMemoryError&) {
    return fail(kFailed, kNoMemory);
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    // What LibTorch throws on the CPU has no type of its own.
    const bool memory = message.find("DefaultCPUAllocator") != std::string::npos;
    return fail(kFailed, memory ? kNoMemory : sag_sample::what_went_wrong(message));
  } catch (const std::bad_alloc&) {
    return fail(kFailed, kNoMemory);
  } catch (const std::exception& error) {
    return fail(kFailed, sag_sample::what_went_wrong(error.what()));
  }
}
