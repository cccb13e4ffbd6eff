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
    return fail(kFailed,
                "The device has not enough memory; a smaller --max-rows or --batch needs less.");
  } catch (const c10::Error& error) {
    return fail(kFailed, sag_sample::what_went_wrong(error.what_without_backtrace()));
  } catch (const std::bad_alloc&) {
    return fail(kFailed, "There is not enough memory.");
  } catch (const std::exception& error) {
    return fail(kFailed, sag_sample::what_went_wrong(error.what()));
  }
}
