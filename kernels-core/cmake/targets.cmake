# The object libraries that sources go into: flash_mla_host, flash_mla_cpu_<isa>, flash_mla_<row>.

find_package(OpenMP REQUIRED COMPONENTS CXX)

add_library(flash_mla_options INTERFACE)
target_include_directories(flash_mla_options INTERFACE
                           ${CMAKE_CURRENT_SOURCE_DIR}/include ${CMAKE_CURRENT_SOURCE_DIR}/src
                           ${CMAKE_CURRENT_BINARY_DIR}/generated)
target_compile_definitions(flash_mla_options INTERFACE
                           FLASH_MLA_WITH_CUDA=$<BOOL:${FLASH_MLA_WITH_CUDA}>)
# Error texts and assertions name files relative to these folders: a binary holds no path of the
# machine that built it. The last match counts, and a build folder may lie in the source tree.
set(prefix_map "")
foreach(folder IN ITEMS ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_BINARY_DIR} ${CUTLASS_INCLUDE_DIR})
  list(APPEND prefix_map -ffile-prefix-map=${folder}/=)
endforeach()
list(JOIN prefix_map , nvcc_prefix_map)
target_compile_options(flash_mla_options INTERFACE
                       $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra ${prefix_map}>
                       $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,${nvcc_prefix_map}>)
if(FLASH_MLA_SANITIZE)
  target_compile_options(flash_mla_options INTERFACE
                         $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=address,undefined -fno-omit-frame-pointer>)
  target_link_options(flash_mla_options INTERFACE -fsanitize=address,undefined)
endif()

add_library(flash_mla_host OBJECT)
target_link_libraries(flash_mla_host PUBLIC flash_mla_options OpenMP::OpenMP_CXX)
if(FLASH_MLA_WITH_CUDA)
  # Host files use the CUDA runtime's headers; only .cu files are compiled by nvcc.
  target_include_directories(flash_mla_host SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
endif()

set(flash_mla_object_libraries flash_mla_host)
foreach(row IN LISTS flash_mla_rows)
  if(flash_mla_row_${row}_flags)
    add_library(flash_mla_${row} OBJECT)
    target_link_libraries(flash_mla_${row} PUBLIC flash_mla_options)
    target_compile_options(
      flash_mla_${row} PRIVATE
      $<$<COMPILE_LANGUAGE:CUDA>:${flash_mla_row_${row}_flags} --expt-relaxed-constexpr
      --resource-usage $<$<BOOL:${FLASH_MLA_LINEINFO}>:-lineinfo>>)
    if(flash_mla_cutlass_${row})
      target_include_directories(flash_mla_${row} SYSTEM PRIVATE ${CUTLASS_INCLUDE_DIR})
    endif()
    list(APPEND flash_mla_object_libraries flash_mla_${row})
  endif()
endforeach()

# One source, compiled once per instruction set; runtime/cpu_isa.cc picks one at run time. The files
# include no header with inline functions that other files use: the linker would keep one copy,
# perhaps the one that this machine cannot run.
set(flash_mla_cpu_isas generic)
set(flash_mla_cpu_flags_generic "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND flash_mla_cpu_isas avx2 avx512)
  set(flash_mla_cpu_flags_avx2 -mavx2 -mfma -mf16c)
  set(flash_mla_cpu_flags_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c
                                 -mprefer-vector-width=512)
endif()
foreach(isa IN LISTS flash_mla_cpu_isas)
  add_library(flash_mla_cpu_${isa} OBJECT)
  target_link_libraries(flash_mla_cpu_${isa} PUBLIC flash_mla_options)
  target_compile_definitions(flash_mla_cpu_${isa} PRIVATE FLASH_MLA_ISA=${isa})
  target_compile_options(flash_mla_cpu_${isa} PRIVATE -O3 -Wno-psabi ${flash_mla_cpu_flags_${isa}})
  target_compile_definitions(flash_mla_host PRIVATE FLASH_MLA_HAS_ISA_${isa}=1)
  list(APPEND flash_mla_object_libraries flash_mla_cpu_${isa})
endforeach()
