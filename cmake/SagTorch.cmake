# Finds LibTorch. Include at file scope, after project(): a CUDA build of LibTorch enables the CUDA language.

# The version that sag is tested with: scripts/bootstrap.sh reads it here and downloads it. Older ones are refused.
set(sag_torch_tested 2.11.0)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" sag_torch_minimum "${sag_torch_tested}")

if(NOT DEFINED CMAKE_BUILD_TYPE OR "${CMAKE_BUILD_TYPE}" STREQUAL "")
  if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
  endif()
endif()

# LibTorch wants its own variable and ignores CMAKE_CUDA_ARCHITECTURES; unset, it asks the machine's GPU,
# and a build machine often has none.
if(NOT DEFINED TORCH_CUDA_ARCH_LIST AND NOT DEFINED ENV{TORCH_CUDA_ARCH_LIST})
  set(TORCH_CUDA_ARCH_LIST "8.0;9.0+PTX" CACHE STRING "CUDA architectures, in LibTorch's notation")
endif()

if(NOT TARGET torch)
  # GLOBAL, for a project that takes sag in with add_subdirectory links the same imported targets.
  set(sag_saved_targets_global "${CMAKE_FIND_PACKAGE_TARGETS_GLOBAL}")
  set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL ON)
  find_package(Torch ${sag_torch_minimum} QUIET GLOBAL)
  set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL "${sag_saved_targets_global}")
  if(NOT TARGET torch)
    message(FATAL_ERROR
      "sag needs LibTorch ${sag_torch_minimum} or newer: pass -DCMAKE_PREFIX_PATH=<libtorch>, for a Python wheel "
      "the folder that python -c 'import torch; print(torch.utils.cmake_prefix_path)' prints.")
  endif()
  message(STATUS "LibTorch ${Torch_VERSION}: ${Torch_DIR}")
endif()
set(SAG_TORCH_VERSION "${Torch_VERSION}")
