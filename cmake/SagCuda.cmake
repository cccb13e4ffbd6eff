# Decides SAG_WITH_CUDA from SAG_CUDA and from the LibTorch that was found.

if(TARGET torch_cuda)
  set(sag_torch_has_cuda ON)
else()
  set(sag_torch_has_cuda OFF)
endif()

if("${SAG_CUDA}" STREQUAL "AUTO")
  set(SAG_WITH_CUDA ${sag_torch_has_cuda})
elseif("${SAG_CUDA}")
  if(NOT sag_torch_has_cuda)
    message(FATAL_ERROR "SAG_CUDA is ON, but the LibTorch at ${Torch_DIR} was built without CUDA.")
  endif()
  set(SAG_WITH_CUDA ON)
else()
  set(SAG_WITH_CUDA OFF)
endif()
