# All C++ keeps to the format of .clang-format:
#
#   cmake -DSOURCE=<root of the tree> -DCLANG_FORMAT=<program> -P clang_format.cmake

set(files "")
foreach(folder IN ITEMS include src command examples tests benchmarks)
  foreach(ending IN ITEMS h cpp cu)
    list(APPEND files "${SOURCE}/${folder}/*.${ending}")
  endforeach()
endforeach()
file(GLOB_RECURSE files RELATIVE "${SOURCE}" ${files})
if(NOT files)
  message(FATAL_ERROR "There is no C++ in ${SOURCE}.")
endif()
execute_process(COMMAND "${CLANG_FORMAT}" --dry-run -Werror ${files} WORKING_DIRECTORY "${SOURCE}" RESULT_VARIABLE code)
if(NOT code EQUAL 0)
  message(FATAL_ERROR "C++ differs from the format: run clang-format -i, in the version of tools/requirements.txt.")
endif()
list(LENGTH files count)
message(STATUS "${count} files keep to the format.")
