#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "given.h"
#include "range.h"

namespace sag_sample {

/// One option: all that the command line, --help and the reader of model.json need to know of it.
struct Option {
  /// On the command line, "--steps". Empty: only model.json has it.
  std::string name = {};
  /// In model.json and in the report, "steps". Empty: only the command line has it.
  std::string key = {};
  /// What --help calls its value; empty: it is a flag.
  std::string type = {};
  std::string help = {};
  /// What --help shows as the default.
  std::string shown_default = {};
  /// Whether model.json may have it.
  bool in_model = false;
  /// Whether every value counts, and not the last one only.
  bool repeats = false;
  /// Whether --help leaves it out.
  bool hidden = false;
  /// What it chooses from, where `--name help` lists it.
  std::vector<std::string_view> listed = {};
  /// Throws UsageError when the option does not take this.
  std::function<void(const Given&)> check = [](const Given&) {};

  /// What `Choices` call it.
  const std::string& id() const { return name.empty() ? key : name; }
};

/// Options that --help shows under one title.
struct OptionGroup {
  std::string title;
  std::vector<Option> options;
};

/// The first four fields of an option.
struct OptionText {
  std::string name, key, type, help;
};

/// An option that is kept in a struct, T.
template <typename T>
struct Row : Option {
  Row(OptionText text, std::function<void(T&, const Given&)> read_into,
      std::function<Value(const T&)> print)
      : Option{.name = std::move(text.name),
               .key = std::move(text.key),
               .type = std::move(text.type),
               .help = std::move(text.help)},
        read(std::move(read_into)),
        write(std::move(print)) {}

  /// model.json may have it, under its key.
  Row from_model() && {
    in_model = true;
    return std::move(*this);
  }
  /// --help shows this as the default, in place of the struct's value.
  Row by_default(std::string text) && {
    shown_default = std::move(text);
    return std::move(*this);
  }
  /// --help adds this to the default.
  Row and_by_default(std::string text) && {
    more_default = std::move(text);
    return std::move(*this);
  }
  Row hide() && {
    hidden = true;
    return std::move(*this);
  }

  std::string more_default = {};
  std::function<void(T&, const Given&)> read;
  std::function<Value(const T&)> write;
};

/// Options that are kept in a struct, T, whose own values are the defaults.
template <typename T>
class OptionTable : public OptionGroup {
 public:
  OptionTable(std::string title, std::vector<Row<T>> rows, T defaults = {});

  /// Returns the struct: what was chosen, and the defaults for the rest.
  T decide(const Choices& choices) const;

  /// Returns the values of a decided struct by their keys, for the report.
  std::vector<std::pair<std::string, Value>> report(const T& decided) const;

 private:
  std::vector<Row<T>> rows_;
  T defaults_;
};

/// These read what was given, and throw UsageError, in one sentence, on anything else.
std::int64_t read_number(const Given& given, const Range<std::int64_t>& range);
std::uint64_t read_number(const Given& given, const Range<std::uint64_t>& range);
double read_number(const Given& given, const Range<double>& range);
/// A text that is not empty.
std::string read_text(const Given& given);
std::string read_choice(const Given& given, std::span<const std::string_view> choices);
bool read_flag(const Given& given);

/// Returns a value as --help shows it; empty: not at all.
std::string shown(const Value& value);

template <typename Field>
Value value_of(const Field& field) {
  return field;
}
template <typename Field>
Value value_of(const std::optional<Field>& field) {
  return field ? Value(*field) : Value();
}

template <typename T, typename Field, typename Number>
Row<T> number(const char* name, const char* key, Field T::*field, Range<Number> range,
              const char* type, const char* help) {
  return {{name, key, type, help},
          [=](T& t, const Given& given) { t.*field = read_number(given, range); },
          [=](const T& t) { return value_of(t.*field); }};
}

template <typename T, typename Field>
Row<T> text(const char* name, const char* key, Field T::*field, const char* type,
            const char* help) {
  return {{name, key, type, help},
          [=](T& t, const Given& given) { t.*field = read_text(given); },
          [=](const T& t) { return value_of(t.*field); }};
}

/// A text that may be empty, of the command line.
template <typename T>
Row<T> any_text(const char* name, const char* key, std::string T::*field, const char* type,
                const char* help) {
  return {{name, key, type, help},
          [=](T& t, const Given& given) { t.*field = given.words.back(); },
          [=](const T& t) { return value_of(t.*field); }};
}

/// Texts that may be empty, each with an option of its own.
template <typename T>
Row<T> texts(const char* name, std::vector<std::string> T::*field, const char* type,
             const char* help) {
  Row<T> row = {{name, "", type, help},
                [=](T& t, const Given& given) { t.*field = given.words; },
                [](const T&) { return Value(); }};
  row.repeats = true;
  return row;
}

/// Texts that are not empty, each with an option of its own. The report has them joined by commas.
template <typename T>
Row<T> several(const char* name, const char* key, std::vector<std::string> T::*field,
               const char* type, const char* help) {
  Row<T> row = {{name, key, type, help},
                [=](T& t, const Given& given) {
                  for (const auto& word : given.words) {
                    (t.*field).push_back(read_text({.where = given.where, .words = {word}}));
                  }
                },
                [=](const T& t) {
                  std::string joined;
                  for (const auto& text : t.*field) joined += (joined.empty() ? "" : ", ") + text;
                  return joined.empty() ? Value() : Value(joined);
                }};
  row.repeats = true;
  return row;
}

template <typename T>
Row<T> flag(const char* name, const char* key, bool T::*field, const char* help) {
  return {{name, key, "", help},
          [=](T& t, const Given& given) { t.*field = read_flag(given); },
          [=](const T& t) { return value_of(t.*field); }};
}

/// Names joined by "|", for --help.
std::string joined(std::span<const std::string_view> names);

/// One name of a few. `parse` makes the field of it, `print` the name again.
template <typename T>
Row<T> choice(const char* name, const char* key, std::span<const std::string_view> names,
              const char* help, std::function<void(T&, const std::string&)> parse,
              std::function<Value(const T&)> print) {
  const std::vector<std::string_view> kept(names.begin(), names.end());
  return {{name, key, joined(names), help},
          [kept, parse = std::move(parse)](T& t, const Given& given) {
            parse(t, read_choice(given, kept));
          },
          std::move(print)};
}

template <typename T>
Row<T> choice(const char* name, const char* key, std::string T::*field,
              std::span<const std::string_view> names, const char* help) {
  return choice<T>(
      name, key, names, help, [=](T& t, const std::string& chosen) { t.*field = chosen; },
      [=](const T& t) { return value_of(t.*field); });
}

/// One name of so many that `--name help` lists them.
template <typename T>
Row<T> listed_choice(const char* name, const char* key, std::string T::*field,
                     std::span<const std::string_view> names, const char* help) {
  auto row = choice(name, key, field, names, help);
  row.type = "NAME";
  row.listed.assign(names.begin(), names.end());
  return row;
}

/// A flag that is not kept in the struct: whoever asks looks for it in the choices.
template <typename T>
Row<T> mark(const char* name, const char* help) {
  return {{name, "", "", help}, [](T&, const Given&) {}, [](const T&) { return Value(); }};
}

template <typename T>
OptionTable<T>::OptionTable(std::string title, std::vector<Row<T>> rows, T defaults)
    : OptionGroup{.title = std::move(title), .options = {}},
      rows_(std::move(rows)),
      defaults_(std::move(defaults)) {
  for (auto& row : rows_) {
    row.check = [read = row.read](const Given& given) {
      T scratch;
      read(scratch, given);
    };
    if (row.shown_default.empty()) row.shown_default = shown(row.write(defaults_));
    if (row.in_model && !row.shown_default.empty()) {
      row.shown_default = "the model's, else " + row.shown_default;
    }
    row.shown_default += row.more_default;
    options.push_back(row);
  }
}

template <typename T>
T OptionTable<T>::decide(const Choices& choices) const {
  T decided = defaults_;
  for (const auto& row : rows_) {
    if (const auto given = choices.find(row.id()); given != choices.end()) {
      row.read(decided, given->second);
    }
  }
  return decided;
}

template <typename T>
std::vector<std::pair<std::string, Value>> OptionTable<T>::report(const T& decided) const {
  std::vector<std::pair<std::string, Value>> values;
  for (const auto& row : rows_) {
    if (!row.key.empty()) values.emplace_back(row.key, row.write(decided));
  }
  return values;
}

}  // namespace sag_sample
