#include "error.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <sstream>

namespace simt {
namespace {

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// The two lines that binutils' addr2line prints, function and file:line; empty where it is missing.
std::pair<std::string, std::string> looked_up(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) {
    return {};
  }
  std::ostringstream command;
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase);
  command << "addr2line -f -C -e '" << info.dli_fname << "' 0x" << std::hex << offset << " 2>&1";
  std::pair<std::string, std::string> found;
  if (FILE* pipe = popen(command.str().c_str(), "r")) {
    std::string* lines[] = {&found.first, &found.second};
    char text[4096];
    for (int i = 0; i < 2 && std::fgets(text, sizeof text, pipe); ++i) {
      *lines[i] = std::string(text, std::strcspn(text, "\n"));
    }
    if (pclose(pipe) != 0) {
      return {};
    }
  }
  return found;
}

}  // namespace

bool Site::operator==(const Site& other) const {
  return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
}

std::string Site::text() const { return std::string(base_name(file)) + ":" + std::to_string(line); }

std::string source_of(const void* code) {
  // The address is where a call returns to; the call itself ends a byte before.
  std::string line = looked_up(static_cast<const char*>(code) - 1).second;
  line = line.substr(0, line.find(" (discriminator"));
  if (line.empty() || line[0] == '?') {
    std::ostringstream text;
    text << "code at " << code;
    return text.str();
  }
  return base_name(line.c_str());
}

std::string function_of(const void* code) {
  const std::string name = looked_up(code).first;
  if (name.empty() || name[0] == '?') {
    return "a kernel";
  }
  std::string plain = name.substr(0, name.rfind('('));
  for (const std::string noise : {"void ", "(anonymous namespace)::"}) {
    for (size_t at; (at = plain.find(noise)) != std::string::npos;) {
      plain.erase(at, noise.size());
    }
  }
  return plain;
}

}  // namespace simt
