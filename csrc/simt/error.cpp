#include "error.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <sstream>
#include <vector>

namespace simt {
namespace {

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

struct Frame {
  std::string function, line;
};

// What binutils' addr2line says of an address: the function that it is in, behind those that are inlined there, the
// innermost first. Empty where it is missing.
std::vector<Frame> frames_of(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) {
    return {};
  }
  std::ostringstream command;
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase);
  command << "addr2line -f -i -C -e '" << info.dli_fname << "' 0x" << std::hex << offset << " 2>&1";
  std::vector<Frame> frames;
  if (FILE* pipe = popen(command.str().c_str(), "r")) {
    char function[4096], line[4096];
    while (std::fgets(function, sizeof function, pipe) && std::fgets(line, sizeof line, pipe)) {
      frames.push_back(
          {std::string(function, std::strcspn(function, "\n")), std::string(line, std::strcspn(line, "\n"))});
    }
    if (pclose(pipe) != 0) {
      return {};
    }
  }
  return frames;
}

}  // namespace

bool Site::operator==(const Site& other) const {
  return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
}

std::string Site::text() const { return std::string(base_name(file)) + ":" + std::to_string(line); }

std::string source_of(const void* code) {
  // The address is where a call returns to; the call itself ends a byte before.
  for (const Frame& frame : frames_of(static_cast<const char*>(code) - 1)) {
    // Of __ldg and its like, the line that calls them.
    if (frame.line[0] != '?' && frame.line.find("/simt/math.h") == std::string::npos) {
      return base_name(frame.line.substr(0, frame.line.find(" (discriminator")).c_str());
    }
  }
  std::ostringstream text;
  text << "code at " << code;
  return text.str();
}

std::string function_of(const void* code) {
  const std::vector<Frame> frames = frames_of(code);
  if (frames.empty() || frames.back().function[0] == '?') {
    return "a kernel";
  }
  const std::string& name = frames.back().function;
  std::string plain = name.substr(0, name.rfind('('));
  for (const std::string noise : {"void ", "(anonymous namespace)::"}) {
    for (size_t at; (at = plain.find(noise)) != std::string::npos;) {
      plain.erase(at, noise.size());
    }
  }
  return plain;
}

}  // namespace simt
