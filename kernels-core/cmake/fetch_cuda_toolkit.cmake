# A CUDA toolkit from the package index, for FLASH_MLA_CUDA=ON on a machine without nvcc, or whose
# nvcc cannot compile for the machine asked for.
# Sets CMAKE_CUDA_COMPILER and CUDAToolkit_ROOT, and CUDA_cudart_static_LIBRARY when cross-compiling.

find_package(Python3 COMPONENTS Interpreter REQUIRED)

# -I: inside an isolated Python build environment pip is only visible without PYTHONPATH.
function(flash_mla_fetch_cuda folder)
  execute_process(COMMAND ${Python3_EXECUTABLE} -I -m pip install --quiet --target ${folder} ${ARGN}
                  RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR
            "FLASH_MLA_CUDA=ON: no nvcc, and pip could not fetch one (${ARGN}); install the CUDA "
            "toolkit 13, or pass FLASH_MLA_CUDA=OFF")
  endif()
endfunction()

set(cuda_wheels ${CMAKE_BINARY_DIR}/cuda-wheels)
set(toolkit_root ${cuda_wheels}/nvidia/cu13)
if(NOT EXISTS ${toolkit_root}/lib64)
  message(STATUS "flash_mla: fetching a CUDA toolkit from the package index")
  # cuda-toolkit pins nvcc, crt and nvvm to one another; nvidia-cuda-nvcc alone does not.
  flash_mla_fetch_cuda(${cuda_wheels} "cuda-toolkit[nvcc,cccl,cudart]==13.0.3.*")
  # nvcc looks for its libraries in lib64 beside its own bin, and for an unversioned libcudart.so;
  # the wheels have lib, and libcudart.so.13 alone.
  file(CREATE_LINK lib ${toolkit_root}/lib64 SYMBOLIC)
  file(CREATE_LINK libcudart.so.13 ${toolkit_root}/lib/libcudart.so SYMBOLIC)
endif()

if(CMAKE_CROSSCOMPILING)  # the runtime that is linked is that of the other machine
  set(runtime ${CMAKE_BINARY_DIR}/cuda-runtime)
  if(NOT EXISTS ${runtime})
    flash_mla_fetch_cuda(${runtime} --no-deps --only-binary=:all: "nvidia-cuda-runtime==13.0.*"
                         --platform manylinux2014_${CMAKE_SYSTEM_PROCESSOR})
  endif()
  set(CUDA_cudart_static_LIBRARY ${runtime}/nvidia/cu13/lib/libcudart_static.a CACHE FILEPATH "")
  # nvcc links CMake's test programs too. The linker passes over libraries of this machine.
  string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${runtime}/nvidia/cu13/lib")
endif()

unset(CMAKE_CUDA_COMPILER)  # the answer of check_language hides the cache
set(CMAKE_CUDA_COMPILER ${toolkit_root}/bin/nvcc CACHE FILEPATH "nvcc from the package index" FORCE)
set(CUDAToolkit_ROOT ${toolkit_root} CACHE PATH "CUDA toolkit from the package index" FORCE)
