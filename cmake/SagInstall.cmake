include(CMakePackageConfigHelpers)

set(sag_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/sag")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" SAG_TORCH_MINOR "${SAG_TORCH_VERSION}")

install(TARGETS sag
  EXPORT sag-targets
  RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}"
  LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}"
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}"
  FILE_SET HEADERS DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(TARGETS sag_ops LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(EXPORT sag-targets NAMESPACE sag:: DESTINATION "${sag_package_dir}")

configure_package_config_file(
  "${CMAKE_CURRENT_LIST_DIR}/sag-config.cmake.in" "${PROJECT_BINARY_DIR}/sag-config.cmake"
  INSTALL_DESTINATION "${sag_package_dir}"
  NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/sag-config-version.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/sag-config.cmake" "${PROJECT_BINARY_DIR}/sag-config-version.cmake"
  DESTINATION "${sag_package_dir}")

install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/models/skeletons" DESTINATION share/sag)

if(TARGET sag-sample)
  install(TARGETS sag-sample RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()
