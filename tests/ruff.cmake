# All Python keeps to the rules and the format of ruff.toml:
#
#   cmake -DSOURCE=<root of the tree> -DPYTHON=<a Python that has ruff> -P ruff.cmake

set(folders exporter tools tests)
foreach(arguments IN ITEMS "check;--quiet" "format;--check;--quiet")
  execute_process(COMMAND "${PYTHON}" -m ruff ${arguments} --no-cache ${folders}
    WORKING_DIRECTORY "${SOURCE}" RESULT_VARIABLE code)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "Python differs from the style: run \"ruff check --fix\" and \"ruff format\", with the ruff of "
      "tools/requirements.txt.")
  endif()
endforeach()
