# Toolchain for aarch64 (GH200, GB200) on another Linux machine: the distribution's cross-compiler
# (Debian: g++-12-aarch64-linux-gnu), and nvcc with the other machine's CUDA runtime from a toolkit
# that holds it or, with FLASH_MLA_CUDA=ON, from the package index.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

find_program(flash_mla_cross_compiler NAMES aarch64-linux-gnu-g++ aarch64-linux-gnu-g++-14
             aarch64-linux-gnu-g++-13 aarch64-linux-gnu-g++-12 REQUIRED)
set(CMAKE_CXX_COMPILER ${flash_mla_cross_compiler})
set(CMAKE_CUDA_HOST_COMPILER ${flash_mla_cross_compiler})

set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)

find_program(flash_mla_emulator qemu-aarch64)  # runs tests
if(flash_mla_emulator)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${flash_mla_emulator} -L /usr/aarch64-linux-gnu)
endif()
