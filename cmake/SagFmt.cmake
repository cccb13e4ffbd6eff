# {fmt} is used in .cpp files only, header-only and private: LibTorch carries a copy of its own, whose headers
# win over the system's when they are of another version, so linking a system libfmt fails.
#
# Usage: sag_use_fmt(<target>)

find_package(fmt QUIET)
if(NOT TARGET fmt::fmt-header-only)
  find_path(SAG_FMT_INCLUDE_DIR fmt/format.h HINTS ${TORCH_INCLUDE_DIRS})
  mark_as_advanced(SAG_FMT_INCLUDE_DIR)
  if(NOT SAG_FMT_INCLUDE_DIR)
    message(FATAL_ERROR
      "The tests and the command need {fmt}: install it (Debian and Ubuntu: libfmt-dev), set fmt_DIR, or build the "
      "library alone: -DSAG_BUILD_TESTS=OFF -DSAG_BUILD_EXAMPLES=OFF.")
  endif()
endif()

# No link to fmt's target: it has no code to link, and a static sag would hand the dependency to its consumers.
function(sag_use_fmt target)
  target_compile_definitions(${target} PRIVATE FMT_HEADER_ONLY=1)
  if(TARGET fmt::fmt-header-only)
    target_include_directories(${target} SYSTEM PRIVATE
      $<TARGET_PROPERTY:fmt::fmt-header-only,INTERFACE_INCLUDE_DIRECTORIES>)
  else()
    target_include_directories(${target} SYSTEM PRIVATE "${SAG_FMT_INCLUDE_DIR}")
  endif()
endfunction()
