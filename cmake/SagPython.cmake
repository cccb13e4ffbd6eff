# Finds a Python with this LibTorch's PyTorch, for the tests of the exporter, of the tools and of compiled models. Nothing
# else needs one.
#
#   SAG_PYTHON      the interpreter; empty: those tests are left out
#   SAG_PYTHONPATH  folders that hold what tools/requirements.txt names, if it is not installed in that Python

function(sag_python_fits python result)
  execute_process(COMMAND "${python}" -c "import torch; print(torch.__version__)"
    OUTPUT_VARIABLE version ERROR_QUIET RESULT_VARIABLE code)
  if(code EQUAL 0 AND version MATCHES "^${SAG_TORCH_VERSION}")
    set(${result} ON PARENT_SCOPE)
  else()
    set(${result} OFF PARENT_SCOPE)
  endif()
endfunction()

if(NOT DEFINED SAG_PYTHON)
  set(sag_python "")
  # A LibTorch of a wheel lies inside the Python that it was installed for.
  if(Torch_DIR MATCHES "^(.*)/lib/python3[^/]*/(site|dist)-packages/torch/")
    set(sag_candidate "${CMAKE_MATCH_1}/bin/python3")
    sag_python_fits("${sag_candidate}" sag_fits)
    if(sag_fits)
      set(sag_python "${sag_candidate}")
    endif()
  endif()
  set(SAG_PYTHON "${sag_python}" CACHE FILEPATH "A Python with PyTorch ${SAG_TORCH_VERSION}, for tests; empty: none")
endif()
set(SAG_PYTHONPATH "" CACHE STRING "Folders with what tools/requirements.txt names, for tests")

if(SAG_PYTHON)
  message(STATUS "Python for tests: ${SAG_PYTHON}")
else()
  message(STATUS "Python for tests: none with PyTorch ${SAG_TORCH_VERSION}, so those of the exporter, the tools "
    "and compiled models are left out; -DSAG_PYTHON=<python> names one")
endif()

# sag_python_imports(<module> <result> <what>): whether SAG_PYTHON finds the module, with SAG_PYTHONPATH. If not, it says
# that <what> is left out.
function(sag_python_imports module result what)
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -E env "PYTHONPATH=${SAG_PYTHONPATH}" "${SAG_PYTHON}" -c
      "import importlib.util, sys; sys.exit(importlib.util.find_spec('${module}') is None)"
    OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE code)
  if(code EQUAL 0)
    set(${result} ON PARENT_SCOPE)
  else()
    set(${result} OFF PARENT_SCOPE)
    message(STATUS "Python for tests: it has no ${module} (tools/requirements.txt), so ${what} left out")
  endif()
endfunction()

# sag_add_python_test(<name> COMMAND <argument of python>... [ENVIRONMENT <variable=value>...]
#                     [PROPERTIES <property>...])
#
# A ctest test that runs Python, with exporter/, tools/ and tests/ on its path. What PyTorch's compiler writes stays in the build.
function(sag_add_python_test name)
  cmake_parse_arguments(PARSE_ARGV 1 ARG "" "" "COMMAND;ENVIRONMENT;PROPERTIES")
  set(scratch "${PROJECT_BINARY_DIR}/tests/inductor")
  file(MAKE_DIRECTORY "${scratch}")
  add_test(NAME ${name} COMMAND "${SAG_PYTHON}" -B ${ARG_COMMAND}
    WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}/tests")
  set(environment
    "PYTHONPATH=${PROJECT_SOURCE_DIR}/exporter:${PROJECT_SOURCE_DIR}/tools:${PROJECT_SOURCE_DIR}/tests:${SAG_PYTHONPATH}"
    "CXX=${CMAKE_CXX_COMPILER}"
    "TMPDIR=${scratch}"
    "TORCHINDUCTOR_CACHE_DIR=${scratch}/cache"
    ${ARG_ENVIRONMENT})
  set_tests_properties(${name} PROPERTIES
    ENVIRONMENT "${environment}"
    LABELS python TIMEOUT 900 ${ARG_PROPERTIES})
endfunction()
