# The program in the README is the example that is built. Usage: cmake -DSOURCE=<root> -P readme.cmake
file(READ "${SOURCE}/README.md" readme)
file(READ "${SOURCE}/examples/minimal.cpp" program)
string(FIND "${readme}" "```cpp\n${program}```" at)
if(at EQUAL -1)
  message(FATAL_ERROR "README.md must hold examples/minimal.cpp, word for word, in its ```cpp block.")
endif()
