# The tests of style: clang-tidy and clang-format, in the versions that tools/requirements.txt names, for other versions
# say other things. A test whose program is missing is skipped, and says why.

# sag_find_style_program(<variable> <name>): looks where SAG_PYTHONPATH leads, then on the PATH.
function(sag_find_style_program variable name)
  string(REPLACE "-" "_" module "${name}")
  string(REPLACE ":" ";" hints "${SAG_PYTHONPATH}")
  list(TRANSFORM hints APPEND "/${module}/data/bin")
  find_program(${variable} ${name} HINTS ${hints})
  mark_as_advanced(${variable})

  file(STRINGS "${PROJECT_SOURCE_DIR}/tools/requirements.txt" wanted REGEX "^${name}==")
  string(REPLACE "${name}==" "" wanted "${wanted}")
  set(found "")
  if(${variable})
    execute_process(COMMAND "${${variable}}" --version OUTPUT_VARIABLE output ERROR_QUIET)
    string(REGEX MATCH "version ([0-9.]+)" output "${output}")
    set(found "${CMAKE_MATCH_1}")
  endif()
  set(${variable}_PROBLEM "" PARENT_SCOPE)
  if(NOT found VERSION_EQUAL wanted)
    set(${variable}_PROBLEM
      "needs ${name} ${wanted}: pip install -r tools/requirements.txt, and name the folder in SAG_PYTHONPATH" PARENT_SCOPE)
  endif()
endfunction()

# sag_add_tidy_tests(<target> LABELS <label>...): clang-tidy over each source of a target, with the target's flags.
function(sag_add_tidy_tests target)
  cmake_parse_arguments(PARSE_ARGV 1 ARG "" "" "LABELS")
  get_target_property(folder ${target} SOURCE_DIR)
  get_target_property(sources ${target} SOURCES)
  list(FILTER sources INCLUDE REGEX "\\.cpp$")
  string(REGEX REPLACE "([][+.*()^$?|\\])" "\\\\\\1" ours "${PROJECT_SOURCE_DIR}")
  set(includes "$<TARGET_PROPERTY:${target},INCLUDE_DIRECTORIES>")
  # The compiler's own folders must keep their order.
  string(REGEX REPLACE "([][+.*()^$?|\\])" "\\\\\\1" implicit "${CMAKE_CXX_IMPLICIT_INCLUDE_DIRECTORIES}")
  list(JOIN implicit "|" implicit)
  set(includes "$<FILTER:${includes},EXCLUDE,^(${implicit})$>")
  set(our_includes "$<FILTER:${includes},INCLUDE,^${ours}/>")
  # As system headers, or clang-tidy checks all of LibTorch as well.
  set(other_includes "$<FILTER:${includes},EXCLUDE,^${ours}/>")
  set(definitions "$<TARGET_PROPERTY:${target},COMPILE_DEFINITIONS>" "$<$<BOOL:${SAG_WITH_CUDA}>:SAG_WITH_CUDA>")
  set(definitions "$<FILTER:${definitions},EXCLUDE,^$>")
  foreach(source IN LISTS sources)
    cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY "${folder}")
    cmake_path(RELATIVE_PATH source BASE_DIRECTORY "${PROJECT_SOURCE_DIR}" OUTPUT_VARIABLE name)
    add_test(NAME style.clang-tidy/${name}
      COMMAND "${SAG_CLANG_TIDY}" --quiet "${source}" -- -std=gnu++20
        "-D$<JOIN:${definitions},;-D>" "-I$<JOIN:${our_includes},;-I>" "-isystem$<JOIN:${other_includes},;-isystem>"
      COMMAND_EXPAND_LISTS)
    set_tests_properties(style.clang-tidy/${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT 600)
  endforeach()
endfunction()
