#include "files/pickle_check.h"

#include <algorithm>
#include <cstddef>
#include <deque>
#include <vector>

#include "errors.h"

namespace sag_sample {
namespace {

constexpr int kDeepest = 100;

[[noreturn]] void refuse() {
  throw RunError("The pickle is damaged, nested too deeply, or holds something else than tensors.");
}

// All that is kept of a value: how deep it nests, and whether it is a list or dict that may grow.
struct Value {
  int depth = 0;
  bool grows = false;
};

// Does to depths what LibTorch's Unpickler does to values. A list that grew after it was put into
// something would make that deeper unseen. Only the memo could give it back to grow, so what the
// memo has given out grows no more.
class PickleWalk {
 public:
  explicit PickleWalk(std::string_view pickle) : size_(pickle.size()), rest_(pickle) {}

  void run() {
    if (take(2) != "\x80\x02") refuse();
    for (char opcode = take(1)[0]; opcode != '.'; opcode = take(1)[0]) {
      if (!step_over_scalar(opcode) && !step_over_memo(opcode) && !step_over_container(opcode) &&
          !step_over_call(opcode)) {
        refuse();
      }
    }
  }

 private:
  bool step_over_scalar(char opcode) {
    switch (opcode) {
      case 'N':     // NONE
      case '\x88':  // NEWTRUE
      case '\x89':  // NEWFALSE
        return push_scalar(0);
      case 'K':  // BININT1
        return push_scalar(1);
      case 'M':  // BININT2
        return push_scalar(2);
      case 'J':  // BININT
        return push_scalar(4);
      case 'G':  // BINFLOAT
        return push_scalar(8);
      case '\x8a':  // LONG1
        return push_scalar(number(1));
      case 'X':  // BINUNICODE
        return push_text(number(4));
    }
    return false;
  }

  bool step_over_memo(char opcode) {
    switch (opcode) {
      case 'q':  // BINPUT
        return put(number(1));
      case 'r':  // LONG_BINPUT
        return put(number(4));
      case 'h':  // BINGET
        return get(number(1));
      case 'j':  // LONG_BINGET
        return get(number(4));
    }
    return false;
  }

  bool step_over_container(char opcode) {
    switch (opcode) {
      case '(':  // MARK
        marks_.push_back(stack_.size());
        return true;
      case ')':  // EMPTY_TUPLE
        return push({.depth = 1});
      case ']':  // EMPTY_LIST
      case '}':  // EMPTY_DICT
        return push({.depth = 1, .grows = true});
      case 't':  // TUPLE
        return push({.depth = 1 + pop(count_above_mark())});
      case '\x85':  // TUPLE1
        return push({.depth = 1 + pop(1)});
      case '\x86':  // TUPLE2
        return push({.depth = 1 + pop(2)});
      case '\x87':  // TUPLE3
        return push({.depth = 1 + pop(3)});
      case 'a':  // APPEND
        return grow(1);
      case 'e':  // APPENDS
        return grow(count_above_mark());
      case 's':  // SETITEM
        return grow(2);
      case 'u': {  // SETITEMS
        const std::size_t count = count_above_mark();
        return count % 2 == 0 && grow(count);
      }
    }
    return false;
  }

  bool step_over_call(char opcode) {
    switch (opcode) {
      case 'c':  // GLOBAL: a module and a name
        return push_function();
      case '\x81':  // NEWOBJ: to the Unpickler, the end of an empty tuple
        pop(1);
        return true;
      case 'R':  // REDUCE
      case 'b':  // BUILD
        // A function gives at most back what it got.
        return !lacks_function_ && push({.depth = pop(2)});
      case 'Q':  // BINPERSID: a storage, after its description
        pop(1);
        return push({});
    }
    return false;
  }

  std::string_view take(std::size_t count, std::size_t more = 0) {
    if (count > rest_.size() || more > rest_.size() - count) refuse();
    const auto taken = rest_.substr(0, count);
    rest_.remove_prefix(count + more);
    return taken;
  }

  std::size_t number(std::size_t bytes) {
    std::size_t value = 0, shift = 0;
    for (const char byte : take(bytes)) {
      value |= std::size_t{static_cast<unsigned char>(byte)} << shift;
      shift += 8;
    }
    return value;
  }

  bool push(Value value) {
    if (value.depth > kDeepest) refuse();
    stack_.push_back(&values_.emplace_back(value));
    return true;
  }

  bool push_scalar(std::size_t bytes) {
    take(bytes);
    return push({});
  }

  // A text may be the name of a type: "Dict[str, List[int]]".
  bool push_text(std::size_t bytes) {
    std::ptrdiff_t depth = 0;
    for (const char c : take(bytes)) {
      if (c == '[' && ++depth > kDeepest) return false;
      if (c == ']' && depth > 0) --depth;
    }
    return push({});
  }

  // A tensor with attributes is rebuilt by the function that the next GLOBAL names, and the
  // Unpickler calls that without looking whether there is one.
  bool push_function() {
    const auto module = take(rest_.find('\n'), 1), name = take(rest_.find('\n'), 1);
    if (lacks_function_ && module != "torch._utils") return false;
    lacks_function_ = name == "_rebuild_from_type_v2";
    return push({});
  }

  // Takes values away and gives the depth of the deepest.
  int pop(std::size_t count) {
    if (count > stack_.size()) refuse();
    int depth = 0;
    for (; count > 0; --count) {
      depth = std::max(depth, stack_.back()->depth);
      stack_.pop_back();
    }
    return depth;
  }

  bool grow(std::size_t count) {
    const int depth = 1 + pop(count);
    if (stack_.empty() || !stack_.back()->grows || depth > kDeepest) return false;
    stack_.back()->depth = std::max(stack_.back()->depth, depth);
    return true;
  }

  std::size_t count_above_mark() {
    if (marks_.empty() || marks_.back() > stack_.size()) refuse();
    const std::size_t count = stack_.size() - marks_.back();
    marks_.pop_back();
    return count;
  }

  // The Unpickler makes room for all numbers up to this one.
  bool put(std::size_t place) {
    if (stack_.empty() || place >= size_) return false;
    if (place >= memo_.size()) memo_.resize(place + 1);
    memo_[place] = stack_.back();
    return true;
  }

  bool get(std::size_t place) {
    if (place >= memo_.size() || !memo_[place]) return false;
    memo_[place]->grows = false;
    stack_.push_back(memo_[place]);
    return true;
  }

  std::size_t size_;
  std::string_view rest_;
  std::deque<Value> values_;
  std::vector<Value*> stack_, memo_;
  std::vector<std::size_t> marks_;
  bool lacks_function_ = false;
};

}  // namespace

void check_pickle(std::string_view pickle) {
  PickleWalk(pickle).run();
}

}  // namespace sag_sample
