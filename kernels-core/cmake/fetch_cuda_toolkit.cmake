# A CUDA toolkit from the package index, for FLASH_MLA_CUDA=ON on a machine without nvcc.
# Sets CMAKE_CUDA_COMPILER and CUDAToolkit_ROOT.

set(cuda_wheels ${CMAKE_BINARY_DIR}/cuda-wheels)
set(toolkit_root ${cuda_wheels}/nvidia/cu13)
if(NOT EXISTS ${toolkit_root}/lib64)
  find_package(Python3 COMPONENTS Interpreter REQUIRED)
  message(STATUS "flash_mla: fetching a CUDA toolkit from the package index")
  # -I: inside an isolated Python build environment pip is only visible without PYTHONPATH.
  # cuda-toolkit pins nvcc, crt and nvvm to one another; nvidia-cuda-nvcc alone does not.
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -I -m pip install --quiet --target ${cuda_wheels}
            "cuda-toolkit[nvcc,cccl,cudart]==13.0.3.*"
    RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR
            "FLASH_MLA_CUDA=ON: no nvcc, and pip could not fetch one; install the CUDA toolkit 13, "
            "or pass FLASH_MLA_CUDA=OFF")
  endif()
  # nvcc looks for its libraries in lib64 beside its own bin, and for an unversioned libcudart.so;
  # the wheels have lib, and libcudart.so.13 alone.
  file(CREATE_LINK lib ${toolkit_root}/lib64 SYMBOLIC)
  file(CREATE_LINK libcudart.so.13 ${toolkit_root}/lib/libcudart.so SYMBOLIC)
endif()
unset(CMAKE_CUDA_COMPILER)  # the answer of check_language hides the cache
set(CMAKE_CUDA_COMPILER ${toolkit_root}/bin/nvcc CACHE FILEPATH "nvcc from the package index" FORCE)
set(CUDAToolkit_ROOT ${toolkit_root} CACHE PATH "CUDA toolkit from the package index" FORCE)
