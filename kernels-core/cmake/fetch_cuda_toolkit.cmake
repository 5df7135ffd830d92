# A CUDA toolkit from the package index, for FLASH_MLA_CUDA=ON on a machine without nvcc.
# Sets CMAKE_CUDA_COMPILER and CUDAToolkit_ROOT.

set(toolkit_root ${CMAKE_BINARY_DIR}/cuda-toolkit)
if(NOT EXISTS ${toolkit_root}/bin/nvcc)
  find_package(Python3 COMPONENTS Interpreter REQUIRED)
  message(STATUS "flash_mla: fetching a CUDA toolkit from the package index")
  # -I: inside an isolated Python build environment pip is only visible without PYTHONPATH.
  # cuda-toolkit pins nvcc, crt and nvvm to one another; nvidia-cuda-nvcc alone does not.
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -I -m pip install --quiet --target ${CMAKE_BINARY_DIR}/cuda-wheels
            "cuda-toolkit[nvcc,cccl,cudart]==13.0.3.*"
    RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR
            "FLASH_MLA_CUDA=ON: no nvcc, and pip could not fetch one; install the CUDA toolkit 13, "
            "or pass FLASH_MLA_CUDA=OFF")
  endif()
  # nvcc looks for its libraries in lib64 and for an unversioned libcudart.so; the wheels have
  # lib and only libcudart.so.13. Symbolic links make of them the usual tree.
  file(GLOB wheel_root ${CMAKE_BINARY_DIR}/cuda-wheels/nvidia/cu13)
  file(MAKE_DIRECTORY ${toolkit_root})
  file(GLOB entries RELATIVE ${wheel_root} ${wheel_root}/*)
  list(REMOVE_ITEM entries lib)
  foreach(entry IN LISTS entries)
    file(CREATE_LINK ${wheel_root}/${entry} ${toolkit_root}/${entry} SYMBOLIC)
  endforeach()
  file(MAKE_DIRECTORY ${toolkit_root}/lib64)
  file(GLOB libraries RELATIVE ${wheel_root}/lib ${wheel_root}/lib/*)
  foreach(library IN LISTS libraries)
    file(CREATE_LINK ${wheel_root}/lib/${library} ${toolkit_root}/lib64/${library} SYMBOLIC)
    string(REGEX REPLACE "\\.so\\..*$" ".so" unversioned ${library})
    if(NOT unversioned STREQUAL library AND NOT unversioned IN_LIST libraries)
      file(CREATE_LINK ${wheel_root}/lib/${library} ${toolkit_root}/lib64/${unversioned} SYMBOLIC)
    endif()
  endforeach()
  file(CREATE_LINK lib64 ${toolkit_root}/lib SYMBOLIC)
endif()
set(CMAKE_CUDA_COMPILER ${toolkit_root}/bin/nvcc CACHE FILEPATH "nvcc from the package index" FORCE)
set(CUDAToolkit_ROOT ${toolkit_root} CACHE PATH "CUDA toolkit from the package index" FORCE)
