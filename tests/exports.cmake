# Reads the symbol table of the shared library and fails when it exports what no public header names:
#
#   cmake -DSOURCE=<root of the tree> -DLIBRARY=<libsag.so> -DNM=<nm> -P exports.cmake
#
# Weak symbols of other libraries (type information of std and of LibTorch) are the compiler's, in every library that
# uses them, and so are the sanitizers' (__odr_asan).

cmake_minimum_required(VERSION 3.25)

file(GLOB headers "${SOURCE}/include/sag/*.h")
set(public "")
foreach(header IN LISTS headers)
  file(READ "${header}" text)
  string(APPEND public "${text}")
endforeach()

execute_process(COMMAND "${NM}" -D -C --defined-only "${LIBRARY}" OUTPUT_VARIABLE table COMMAND_ERROR_IS_FATAL ANY)
# Brackets and semicolons would change how CMake splits lists.
string(REGEX REPLACE "[][;]" " " table "${table}")
string(REPLACE "\n" ";" lines "${table}")

set(faults "")
set(count 0)
foreach(line IN LISTS lines)
  if(NOT line MATCHES "^[0-9a-f]+ ([A-Za-z]) (.+)$")
    continue()
  endif()
  set(kind "${CMAKE_MATCH_1}")
  string(REGEX REPLACE "^(typeinfo for|typeinfo name for|vtable for|VTT for|guard variable for|non-virtual thunk to) "
    "" symbol "${CMAKE_MATCH_2}")
  if(symbol MATCHES "^sag::([A-Za-z_0-9]+)")
    math(EXPR count "${count} + 1")
    if(NOT public MATCHES "[^A-Za-z_0-9]${CMAKE_MATCH_1}[^A-Za-z_0-9]")
      list(APPEND faults "${symbol}")
    endif()
  elseif(NOT kind MATCHES "[VWvwu]" AND NOT symbol MATCHES "^__odr_asan")
    list(APPEND faults "${symbol}")
  endif()
endforeach()

if(count LESS 100)
  message(FATAL_ERROR "${LIBRARY} exports only ${count} symbols of sag: the test does not read it rightly.")
endif()
if(faults)
  list(JOIN faults "\n  " text)
  message(FATAL_ERROR "${LIBRARY} exports what no header in include/sag names:\n  ${text}")
endif()
message(STATUS "${count} exported symbols of sag, all of public headers.")
