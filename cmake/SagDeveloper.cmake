# What only a developer of sag sees: strict warnings on our own targets, and ccache.

function(sag_developer_warnings target)
  if(SAG_WARNINGS_AS_ERRORS)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Werror>)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # maybe-uninitialized: GCC 12 at -O3 sees it in LibTorch's intrusive_ptr, inlined into our functions, where nothing
      # is wrong. missing-field-initializers: designated initialisers leave fields out on purpose.
      target_compile_options(${target} PRIVATE
        $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized;-Wno-missing-field-initializers>)
    endif()
  endif()
endfunction()

# A precompiled header that ccache accepts (its manual, "Precompiled headers").
function(sag_precompile_headers target)
  target_precompile_headers(${target} PRIVATE ${ARGN})
  sag_use_precompiled_flags(${target})
endfunction()

function(sag_reuse_precompiled_headers target from)
  target_precompile_headers(${target} REUSE_FROM ${from})
  sag_use_precompiled_flags(${target})
endfunction()

function(sag_use_precompiled_flags target)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(${target} PRIVATE -fpch-preprocess)
  endif()
endfunction()

# Finds what the tests or the examples need, or says how to get it and which option does without.
function(sag_find_dependency package target debian_packages option)
  find_package(${package} QUIET)
  if(NOT TARGET ${target})
    message(FATAL_ERROR "${option} needs ${target}: install it (Debian and Ubuntu: ${debian_packages}) or pass -D${option}=OFF.")
  endif()
endfunction()

if(PROJECT_IS_TOP_LEVEL AND NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  find_program(SAG_CCACHE ccache)
  mark_as_advanced(SAG_CCACHE)
  if(SAG_CCACHE)
    set(CMAKE_CXX_COMPILER_LAUNCHER
      "${CMAKE_COMMAND};-E;env;CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_ctime,include_file_mtime;${SAG_CCACHE}")
    set(CMAKE_CUDA_COMPILER_LAUNCHER "${CMAKE_CXX_COMPILER_LAUNCHER}")
  endif()
endif()
