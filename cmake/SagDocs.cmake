# The target docs: an HTML reference of the public headers, in docs/ of the build folder. A warning of Doxygen 1.9.4, which
# CI has, is an error.

find_program(SAG_DOXYGEN doxygen)
mark_as_advanced(SAG_DOXYGEN)
set(sag_docs_dir "${PROJECT_BINARY_DIR}/docs")

if(SAG_DOXYGEN)
  # Other versions warn of other things.
  execute_process(COMMAND "${SAG_DOXYGEN}" --version OUTPUT_VARIABLE sag_doxygen_version ERROR_QUIET)
  if(sag_doxygen_version MATCHES "^1\\.9\\.4")
    set(sag_doxygen_warn_as_error FAIL_ON_WARNINGS)
  else()
    set(sag_doxygen_warn_as_error NO)
  endif()
  configure_file("${PROJECT_SOURCE_DIR}/docs/Doxyfile.in" "${PROJECT_BINARY_DIR}/Doxyfile" @ONLY)
  add_custom_target(docs
    COMMAND "${CMAKE_COMMAND}" -E rm -rf "${sag_docs_dir}"
    COMMAND "${SAG_DOXYGEN}" "${PROJECT_BINARY_DIR}/Doxyfile"
    COMMAND "${CMAKE_COMMAND}" -E echo "The API reference: ${sag_docs_dir}/index.html"
    WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}"
    VERBATIM)
else()
  add_custom_target(docs
    COMMAND "${CMAKE_COMMAND}" -E echo
      "The API reference needs doxygen: install it (Debian and Ubuntu: doxygen) and configure again."
    COMMAND "${CMAKE_COMMAND}" -E false
    VERBATIM)
endif()
