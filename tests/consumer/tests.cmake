# Builds the consumer project against sag in every way of getting it, static and shared. The library is compiled with
# the same flags each time, so with ccache it is compiled once. The static install is also the build with SAG_CUDA=OFF.

set(sag_consumer_dir "${PROJECT_BINARY_DIR}/consumer")

# The toolchain of this build, for the others.
set(sag_consumer_cache "${sag_consumer_dir}/initial-cache.cmake")
set(lines "")
foreach(variable IN ITEMS
    CMAKE_BUILD_TYPE CMAKE_CXX_COMPILER CMAKE_CXX_COMPILER_LAUNCHER CMAKE_CXX_FLAGS CMAKE_MAKE_PROGRAM CMAKE_PREFIX_PATH
    CMAKE_CUDA_COMPILER CMAKE_CUDA_COMPILER_LAUNCHER CUDAToolkit_ROOT CUDA_TOOLKIT_ROOT_DIR
    SAG_WARNINGS_AS_ERRORS TORCH_CUDA_ARCH_LIST Torch_DIR fmt_DIR)
  get_property(is_cached CACHE ${variable} PROPERTY TYPE SET)
  if(is_cached)
    set(value "$CACHE{${variable}}")
  else()
    set(value "${${variable}}")
  endif()
  if(NOT "${value}" STREQUAL "" AND NOT "${value}" MATCHES "-NOTFOUND$")
    string(APPEND lines "set(${variable} [==[${value}]==] CACHE STRING \"\")\n")
  endif()
endforeach()
file(CONFIGURE OUTPUT "${sag_consumer_cache}" CONTENT "${lines}" @ONLY)

set(sag_consumer_runner "${CMAKE_CURRENT_LIST_DIR}/run.cmake")

# sag_consumer_test(<name> SOURCE <dir> OPTIONS <cmake option>... [PREFIX <dir>] [RUN <program>] [PROPERTIES <property>...])
function(sag_consumer_test name)
  cmake_parse_arguments(PARSE_ARGV 1 ARG "" "SOURCE;PREFIX;RUN" "OPTIONS;PROPERTIES")
  list(JOIN ARG_OPTIONS "," options)
  add_test(NAME consumer.${name}
    COMMAND "${CMAKE_COMMAND}" "-DSOURCE=${ARG_SOURCE}" "-DBUILD=${sag_consumer_dir}/${name}"
      "-DINITIAL_CACHE=${sag_consumer_cache}" "-DOPTIONS=${options}" "-DPREFIX=${ARG_PREFIX}" "-DRUN=${ARG_RUN}"
      -P "${sag_consumer_runner}")
  set_tests_properties(consumer.${name} PROPERTIES LABELS consumer PROCESSORS 2 TIMEOUT 3000 ${ARG_PROPERTIES})
endfunction()

foreach(linkage IN ITEMS shared static)
  if(linkage STREQUAL "shared")
    set(is_shared ON)
  else()
    set(is_shared OFF)
  endif()

  set(prefix "${sag_consumer_dir}/prefix-${linkage}")
  if((BUILD_SHARED_LIBS AND is_shared) OR NOT (BUILD_SHARED_LIBS OR is_shared))
    # This build has that linkage: install it as it is.
    add_test(NAME consumer.install-${linkage}
      COMMAND "${CMAKE_COMMAND}" --install "${PROJECT_BINARY_DIR}" --prefix "${prefix}")
    set_tests_properties(consumer.install-${linkage} PROPERTIES
      LABELS consumer FIXTURES_SETUP sag-install-${linkage})
  else()
    sag_consumer_test(install-${linkage}
      SOURCE "${PROJECT_SOURCE_DIR}"
      OPTIONS -DSAG_BUILD_TESTS=OFF -DSAG_BUILD_COMMAND=OFF -DSAG_BUILD_EXAMPLES=OFF -DSAG_CUDA=OFF -DBUILD_SHARED_LIBS=${is_shared}
      PREFIX "${prefix}"
      PROPERTIES FIXTURES_SETUP sag-install-${linkage})
  endif()

  sag_consumer_test(installed-${linkage}
    SOURCE "${CMAKE_CURRENT_LIST_DIR}"
    OPTIONS -DSAG_CONSUMES=installed "-Dsag_ROOT=${prefix}"
    RUN consumer
    PROPERTIES FIXTURES_REQUIRED sag-install-${linkage})

  foreach(way IN ITEMS subdirectory fetchcontent)
    sag_consumer_test(${way}-${linkage}
      SOURCE "${CMAKE_CURRENT_LIST_DIR}"
      OPTIONS -DSAG_CONSUMES=${way} -DBUILD_SHARED_LIBS=${is_shared}
      RUN consumer)
  endforeach()
endforeach()
