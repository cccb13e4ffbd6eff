# Reads the #include lines of the library and fails when a room uses one that it may not:
#
#   cmake -DSOURCE=<root of the tree> -P rooms.cmake

cmake_minimum_required(VERSION 3.25)

set(rooms attention model guidance sampling unet)
set(attention_may_use attention)
set(model_may_use attention model)
set(guidance_may_use attention model guidance)
set(sampling_may_use sampling)
set(sampling_may_include model_sampling)
set(unet_may_use attention model unet)

set(faults "")
macro(fault text)
  list(APPEND faults "${file}: ${text}")
endmacro()

# A public header belongs to the room that has the .cpp file of its name; those without one are free to all.
foreach(room IN LISTS rooms)
  file(GLOB sources RELATIVE "${SOURCE}/src/${room}" "${SOURCE}/src/${room}/*.cpp" "${SOURCE}/src/${room}/*.cu")
  foreach(source IN LISTS sources)
    cmake_path(GET source STEM LAST_ONLY name)
    set(room_of_${name} ${room})
  endforeach()
endforeach()

file(GLOB_RECURSE files RELATIVE "${SOURCE}" "${SOURCE}/include/sag/*.h" "${SOURCE}/src/*.cpp" "${SOURCE}/src/*.h"
  "${SOURCE}/src/*.cu" "${SOURCE}/src/*.cuh")
if(NOT files)
  message(FATAL_ERROR "There is no library in ${SOURCE}.")
endif()

foreach(file IN LISTS files)
  cmake_path(GET file STEM LAST_ONLY name)
  if(file MATCHES "^src/([^/]+)/")
    set(room ${CMAKE_MATCH_1})
    set(is_public OFF)
  elseif(DEFINED room_of_${name})
    set(room ${room_of_${name}})
    set(is_public ON)
  elseif(name STREQUAL "sag")
    continue()  # the umbrella
  else()
    set(room "")
    set(is_public ON)
  endif()
  if(NOT room STREQUAL "" AND NOT room IN_LIST rooms)
    fault("src/${room} is not a room of the library")
    continue()
  endif()

  file(STRINGS "${SOURCE}/${file}" includes REGEX "^[ \t]*#[ \t]*include")
  foreach(line IN LISTS includes)
    if(NOT line MATCHES "[<\"]([^>\"]+)[>\"]")
      continue()
    endif()
    set(path "${CMAKE_MATCH_1}")

    # Our own headers.
    if(path STREQUAL "sag/sag.h")
      fault("includes ${path}, the umbrella: name the headers that are used")
    elseif(path MATCHES "^sag/(.+)\\.h$")
      set(header ${CMAKE_MATCH_1})
      if(DEFINED room_of_${header} AND NOT room_of_${header} IN_LIST ${room}_may_use
          AND NOT header IN_LIST ${room}_may_include)
        fault("${room} may not use ${room_of_${header}} (${path})")
      endif()
    elseif(path MATCHES "^([^/]+)/[^/]+\\.(h|cuh)$" AND CMAKE_MATCH_1 IN_LIST rooms)
      if(NOT CMAKE_MATCH_1 STREQUAL room)
        fault("${path} is private to its room")
      endif()
    elseif(path MATCHES "\\.\\.")
      fault("includes ${path}: a header of another room is named from src/ or include/")
    endif()

    # LibTorch's.
    if(is_public AND path MATCHES "^(torch|ATen|c10|caffe2)/" AND NOT path STREQUAL "torch/types.h")
      fault("a public header includes <torch/types.h> at most, not <${path}>")
    endif()
    if(path MATCHES "^torch/(script\\.h|jit\\.h|csrc/jit/|csrc/inductor/)" AND NOT room STREQUAL "unet")
      fault("only unet includes <${path}>")
    endif()
    if(path STREQUAL "torch/library.h" AND NOT room STREQUAL "attention")
      fault("only attention registers ops (<${path}>)")
    endif()
    if(is_public AND path MATCHES "^fmt/")
      fault("fmt stays out of the public headers")
    endif()
  endforeach()
endforeach()

if(faults)
  list(JOIN faults "\n  " text)
  message(FATAL_ERROR "The rooms are out of order:\n  ${text}")
endif()
list(LENGTH files count)
message(STATUS "${count} files keep the order of the rooms.")
