# Configures, builds and runs or installs a project; stops at the first step that fails.
#
#   cmake -DSOURCE=<dir> -DBUILD=<dir> -DINITIAL_CACHE=<file> [-DOPTIONS=-DA=B,-DC=D] [-DRUN=<program>|-DPREFIX=<dir>] -P run.cmake

cmake_minimum_required(VERSION 3.25)

function(step)
  list(JOIN ARGV " " command)
  message(STATUS "${command}")
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result)
  if(NOT "${result}" STREQUAL "0")
    message(FATAL_ERROR "failed (${result}): ${command}")
  endif()
endfunction()

string(REPLACE "," ";" options "${OPTIONS}")
step("${CMAKE_COMMAND}" -S "${SOURCE}" -B "${BUILD}" -G Ninja -C "${INITIAL_CACHE}" ${options})
step("${CMAKE_COMMAND}" --build "${BUILD}")
if(PREFIX)
  file(REMOVE_RECURSE "${PREFIX}")
  step("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${PREFIX}")
endif()
if(RUN)
  step("${BUILD}/${RUN}")
endif()
