// What the machine says when a kernel does what it must not, and where in the source that was.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace simt {

// A place in the source: the line that calls a function whose last parameter is `Site site = Site::here()`.
struct Site {
  const char* file = nullptr;
  unsigned line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const;
  std::string text() const;
};

// Thrown by launch(): "kernel, block, thread: what happened".
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Ends the launch: inside of a kernel the thread that calls it never runs again, outside it throws.
[[noreturn]] void fail(const std::string& what);

// The source line, or else the offset in the library, of an address in the code of this module.
std::string source_of(const void* code);
// The name of the function that begins at `code`.
std::string function_of(const void* code);

}  // namespace simt
