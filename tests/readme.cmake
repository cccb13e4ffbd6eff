# The code in the README and in docs/guidances.md is the examples that are built and tested. Usage:
#
#   cmake -DSOURCE=<root> -P readme.cmake
foreach(pair IN ITEMS "README.md|minimal.cpp" "docs/guidances.md|own_guidance.h")
  string(REPLACE "|" ";" names "${pair}")
  list(GET names 0 page)
  list(GET names 1 example)
  file(READ "${SOURCE}/${page}" text)
  file(READ "${SOURCE}/examples/${example}" program)
  string(FIND "${text}" "```cpp\n${program}```" at)
  if(at EQUAL -1)
    message(FATAL_ERROR "${page} must hold examples/${example}, word for word, in a ```cpp block.")
  endif()
endforeach()
