include(GoogleTest)

# sag_add_test(<name> SOURCES <file>... [INTERNAL <file>...] [LINK <target>...] [LABELS <label>...] [TIMEOUT <seconds>]
#              [PROCESSES <count>] [PROPERTIES <property>...])
#
# One executable for a room's test files; every TEST becomes a ctest test. INTERNAL lists files of src/ whose
# functions the library does not export: they are compiled into the executable too. With PROCESSES the tests are dealt
# out to so many ctest tests, for those that share something dear to set up.
function(sag_add_test name)
  cmake_parse_arguments(PARSE_ARGV 1 ARG "" "TIMEOUT;PROCESSES" "SOURCES;INTERNAL;LINK;LABELS;PROPERTIES")
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  list(TRANSFORM ARG_INTERNAL PREPEND "${PROJECT_SOURCE_DIR}/src/")
  add_executable(${name} ${ARG_SOURCES} ${ARG_INTERNAL})
  target_link_libraries(${name} PRIVATE sag_test_support ${ARG_LINK})
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/src")
  sag_developer_warnings(${name})
  sag_use_fmt(${name})
  sag_reuse_precompiled_headers(${name} sag_test_support)
  if(ARG_INTERNAL)
    # Only the tests share the precompiled header: the library's own files must name what they include.
    set_source_files_properties(${ARG_INTERNAL} PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
  endif()

  if(ARG_PROCESSES)
    foreach(index RANGE 1 ${ARG_PROCESSES})
      math(EXPR shard "${index} - 1")
      add_test(NAME ${name}.${index}of${ARG_PROCESSES} COMMAND ${name})
      set_tests_properties(${name}.${index}of${ARG_PROCESSES} PROPERTIES
        ENVIRONMENT "GTEST_TOTAL_SHARDS=${ARG_PROCESSES};GTEST_SHARD_INDEX=${shard}"
        LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT} ${ARG_PROPERTIES})
    endforeach()
    return()
  endif()

  # Listed when ctest starts, not when the executable is built, so that the test preset's environment applies.
  gtest_discover_tests(${name}
    DISCOVERY_MODE PRE_TEST
    DISCOVERY_TIMEOUT 120
    NO_PRETTY_VALUES
    PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT} ${ARG_PROPERTIES})
endfunction()

# sag_add_skipped_test(<name> <reason> LABELS <label>...)
function(sag_add_skipped_test name reason)
  cmake_parse_arguments(PARSE_ARGV 2 ARG "" "" "LABELS")
  add_test(NAME ${name} COMMAND "${CMAKE_COMMAND}" -E echo "Skipped: this ${reason}")
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" SKIP_REGULAR_EXPRESSION "^Skipped: ")
endfunction()
