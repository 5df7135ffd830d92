# CUTLASS_INCLUDE_DIR: where CuTe's headers are, for the rows whose instructions come from there. From
# CUTLASS_DIR (a CUTLASS checkout) or a place where CMake looks, else from the package index.

set(flash_mla_cutlass_sm90 ON)
set(flash_mla_cutlass_version 4.2.0.0)
set(CUTLASS_DIR "" CACHE PATH "A CUTLASS checkout, or any folder whose include/ holds cute/")

set(needs_cutlass OFF)
foreach(row IN LISTS flash_mla_rows)
  if(flash_mla_cutlass_${row} AND flash_mla_row_${row}_flags)
    set(needs_cutlass ON)
  endif()
endforeach()

if(needs_cutlass)
  set(cutlass_wheel ${CMAKE_BINARY_DIR}/cutlass)
  set(cutlass_in_wheel ${cutlass_wheel}/cutlass_library/source)
  find_path(CUTLASS_INCLUDE_DIR cute/arch/mma_sm90_gmma.hpp
            HINTS ${CUTLASS_DIR}/include ${cutlass_in_wheel}/include ${CUDAToolkit_INCLUDE_DIRS})
  if(NOT CUTLASS_INCLUDE_DIR AND CUTLASS_DIR)
    message(FATAL_ERROR "CUTLASS_DIR: ${CUTLASS_DIR}/include has no cute/arch/mma_sm90_gmma.hpp")
  elseif(NOT CUTLASS_INCLUDE_DIR)
    find_package(Python3 COMPONENTS Interpreter REQUIRED)
    message(STATUS "flash_mla: fetching CUTLASS's headers from the package index")
    # Its requirements, a Python toolchain, are not wanted. -I: see fetch_cuda_toolkit.cmake.
    execute_process(
      COMMAND ${Python3_EXECUTABLE} -I -m pip install --quiet --no-deps --target ${cutlass_wheel}
              nvidia-cutlass==${flash_mla_cutlass_version}
      RESULT_VARIABLE failed)
    if(failed)
      message(FATAL_ERROR
              "flash_mla: the sm90 kernels need CUTLASS's headers, and pip could not fetch them; pass "
              "-DCUTLASS_DIR=<a CUTLASS checkout>, or leave 90a out of FLASH_MLA_CUDA_ARCHITECTURES")
    endif()
    set(CUTLASS_INCLUDE_DIR ${cutlass_in_wheel}/include CACHE PATH "CUTLASS's headers" FORCE)
  endif()
  message(STATUS "flash_mla: CUTLASS headers ${CUTLASS_INCLUDE_DIR}")
endif()
