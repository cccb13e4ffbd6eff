#include "interrupt.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <string_view>

namespace sag_sample {
namespace {

volatile sig_atomic_t asked_to_stop = 0, is_quiet = 0;

void ask_to_stop(int) {
  constexpr std::string_view kSaid =
      "\nsag-sample: stopping after this evaluation; once more stops at once\n";
  const int kept = errno;
  asked_to_stop = 1;
  if (!is_quiet) static_cast<void>(!::write(STDERR_FILENO, kSaid.data(), kSaid.size()));
  errno = kept;
}

}  // namespace

void catch_interrupts(bool quiet) {
  is_quiet = quiet;
  struct sigaction action = {};
  action.sa_handler = ask_to_stop;
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool interrupted() {
  return asked_to_stop != 0;
}

}  // namespace sag_sample
